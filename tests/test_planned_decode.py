"""Mode "auto" on the CPU: the ways, their calibration and the planner's choices, with fake clocks.

The device is simulated: a step takes what a formula says, for sequential decode the sum of
attention and dense work, for a pipeline the longer of the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.engine.calibration import (
    Calibration,
    hash_sources,
    measured_sizes,
    pipelined_sizes,
)
from nanovllm.engine.cuda_graphs import batch_sizes
from nanovllm.engine.decode_runner import DecodeStep
from nanovllm.engine.pipeline_statistics import PipelineStatistics
from nanovllm.engine.planned_decode import SEQUENTIAL, PlannedDecode, splits_to_try
from nanovllm.engine.planner import Plan
from nanovllm.engine.step_inputs import InputLayout, micro_batch_rows
from nanovllm.layers.attention import HeadShape
from nanovllm.layers.attention_torch import TorchBackend
from nanovllm.utils.disk_cache import DiskCache

CPU = torch.device("cpu")
ATTENTION_SECONDS = 1e-8  # a token on the whole device
DENSE_SECONDS = 1e-5  # a sequence, with a floor: the time to read the weights
WEIGHTS_SECONDS = 1e-3
CAPACITY = 600_000


def step_seconds(plan: Plan, batch: int, tokens: float) -> float:
    """What a step takes on the simulated device."""
    attention = ATTENTION_SECONDS * tokens
    if plan == SEQUENTIAL:
        return attention + max(DENSE_SECONDS * batch, WEIGHTS_SECONDS)
    assert plan.attention_sms is not None
    assert plan.ffn_sms is not None
    dense = 2 * max(DENSE_SECONDS * batch / 2, WEIGHTS_SECONDS) * 132 / plan.ffn_sms
    return max(attention * max(1.0, 44 / plan.attention_sms), dense)


@dataclass
class Clock:
    """Device time; events read it."""

    now: float = 0.0

    def event(self) -> SimpleNamespace:
        event = SimpleNamespace(moment=0.0)
        event.record = lambda: setattr(event, "moment", self.now)
        event.elapsed_time = lambda end: (end.moment - event.moment) * 1e3
        return event


@dataclass
class FakeWay:
    """A decode runner whose steps take `step_seconds`, times `slow`."""

    plan: Plan
    clock: Clock
    statistics: PipelineStatistics
    largest: int = 512
    slow: float = 1.0
    captured: list[int] = field(default_factory=list)
    steps: int = 0
    closed: int = 0
    marks: None = None

    @property
    def pipeline(self) -> SimpleNamespace:
        return SimpleNamespace(statistics=self.statistics)

    @property
    def graph_sizes(self) -> list[int]:
        return batch_sizes(self.largest)

    def layout(self, size: int) -> InputLayout:
        backend = TorchBackend(HeadShape(2, 1, 64))
        return InputLayout.decode(size, 16, backend, pipelined=self.plan != SEQUENTIAL)

    def prepare_size(self, context_lens: np.ndarray, size: int) -> DecodeStep:
        layout = self.layout(size)
        rows = micro_batch_rows(context_lens, size) if layout.pipelined else None
        self.tokens = int(context_lens.sum())
        return DecodeStep(layout, rows)

    def capture(self, *, show_progress: bool, sizes: list[int] | None = None) -> None:
        self.captured += sizes or self.graph_sizes

    def run(self, step: DecodeStep, flat: Any, device: torch.device) -> str:
        assert step.layout.num_seqs in self.captured, "a capture on the hot path"
        self.steps += 1
        self.clock.now += self.slow * step_seconds(self.plan, step.layout.num_seqs, self.tokens)
        return f"logits of {self.plan.name}"

    def finish(self, step: DecodeStep, num_seqs: int) -> None:
        self.statistics.count_step(num_seqs, pipelined=step.layout.pipelined)

    def close(self) -> None:
        self.closed += 1


PLANS = [SEQUENTIAL, *(Plan("green", *split) for split in splits_to_try(132))]


def make_calibration(cache: Path, timed: list[tuple[str, int, int]], largest: int) -> Calibration:
    def timer(way: Any, batch: int, tokens: int) -> float:
        timed.append((way.plan.name, batch, tokens))
        return way.slow * step_seconds(way.plan, batch, tokens)

    weight_tokens = WEIGHTS_SECONDS / ATTENTION_SECONDS
    return Calibration(
        timer, largest, CAPACITY, 4096, weight_tokens, {"device": "fake"}, DiskCache("plans", cache)
    )


def make_planned(
    cache: Path, timed: list[tuple[str, int, int]] | None = None, largest: int = 512
) -> tuple[PlannedDecode, Clock]:
    clock, statistics = Clock(), PipelineStatistics()
    ways: Any = {plan: FakeWay(plan, clock, statistics, largest) for plan in PLANS}
    calibration = make_calibration(cache, [] if timed is None else timed, largest)
    planned = PlannedDecode(ways, calibration, clock.event)
    planned.capture(show_progress=False)
    return planned, clock


def run_steps(planned: PlannedDecode, batch: int, context: int, steps: int = 1) -> list[Plan]:
    plans = []
    for _ in range(steps):
        step = planned.prepare(np.full(batch, context))
        planned.run(step, torch.empty(0), CPU)
        planned.finish(step, batch)
        plans.append(step.choice.plan)
    return plans


def best_plan(planned: PlannedDecode, batch: int, context: int) -> Plan:
    """The fastest of the captured plans at that place, by the formula."""
    times = {}
    for plan, way in planned.ways.items():
        sizes = [size for size in way.captured if size >= batch]
        if sizes:
            times[plan] = step_seconds(plan, min(sizes), batch * context)
    return min(times, key=lambda plan: times[plan])


class TestChoosing:
    @pytest.mark.parametrize("batch", [1, 8, 100, 256, 400, 512])
    @pytest.mark.parametrize("context", [16, 128, 512, 1024])
    def test_takes_the_fastest_captured_plan(
        self, tmp_path: Path, batch: int, context: int
    ) -> None:
        planned, _ = make_planned(tmp_path)
        chosen = run_steps(planned, batch, context, 8)[-1]
        best = best_plan(planned, batch, context)

        def seconds(plan: Plan) -> float:
            size = min(size for size in planned.ways[plan].captured if size >= batch)
            return step_seconds(plan, size, batch * context)

        assert seconds(chosen) <= 1.02 * seconds(best), (chosen.name, best.name)

    def test_pipelines_pay_where_attention_and_dense_work_are_alike(self, tmp_path: Path) -> None:
        planned, _ = make_planned(tmp_path)
        assert run_steps(planned, 512, 1000, 8)[-1].mode == "green"
        assert run_steps(planned, 8, 1000, 8)[-1] == SEQUENTIAL
        assert run_steps(planned, 512, 16, 8)[-1] == SEQUENTIAL

    def test_growing_contexts_change_the_plan(self, tmp_path: Path) -> None:
        planned, clock = make_planned(tmp_path)
        plans = [run_steps(planned, 512, context)[0] for context in range(16, 1170, 2)]
        assert plans[0] == SEQUENTIAL
        assert len(set(plans)) >= 3
        total = clock.now
        for plan in planned.ways:
            fixed = sum(step_seconds(plan, 512, 512 * context) for context in range(16, 1170, 2))
            assert total < 1.01 * fixed, plan.name

    def test_leaves_a_plan_that_disappoints(self, tmp_path: Path) -> None:
        planned, _ = make_planned(tmp_path)
        first = run_steps(planned, 512, 1000, 8)[-1]
        planned.ways[first].slow = 1.5  # type: ignore[attr-defined]
        assert run_steps(planned, 512, 1000, 60)[-1] != first

    def test_the_statistics_name_plan_and_times(self, tmp_path: Path) -> None:
        planned, _ = make_planned(tmp_path)
        run_steps(planned, 512, 1000, 10)
        statistics = planned.pipeline.statistics
        record: Any = statistics.as_dict()["planner"]
        assert statistics.mode == "auto"
        assert record["plan"].startswith("green")
        used = record["plans"][record["plan"]]
        assert used["measured_ms"] == pytest.approx(used["predicted_ms"], rel=0.02)
        assert f"Plan: {record['plan']} (switched" in statistics.format()
        assert statistics.steps["pipelined"] == used["steps"]

    def test_steps_without_a_prediction_are_not_timed(self, tmp_path: Path) -> None:
        planned, _ = make_planned(tmp_path)
        assert planned.prepare(np.full(8, 100)).marks is None
        assert planned.prepare(np.full(512, 100)).marks is not None
        run_steps(planned, 8, 100)

    def test_close_closes_all_ways(self, tmp_path: Path) -> None:
        planned, _ = make_planned(tmp_path)
        planned.close()
        planned.close()
        assert [way.closed for way in planned.ways.values()] == [2] * len(PLANS)  # type: ignore[attr-defined]


class TestCalibration:
    def test_a_second_engine_measures_nothing(self, tmp_path: Path) -> None:
        timed: list[tuple[str, int, int]] = []
        first, _ = make_planned(tmp_path, timed)
        assert timed
        count = len(timed)
        second, _ = make_planned(tmp_path, timed)
        assert len(timed) == count
        assert second.calibration.table.to_json() == first.calibration.table.to_json()
        for plan in PLANS:
            assert second.ways[plan].captured == first.ways[plan].captured  # type: ignore[attr-defined]

    def test_takes_few_steps(self, tmp_path: Path) -> None:
        timed: list[tuple[str, int, int]] = []
        make_planned(tmp_path, timed, largest=1024)
        assert len(timed) < 110

    def test_hopeless_batches_are_neither_measured_nor_captured(self, tmp_path: Path) -> None:
        timed: list[tuple[str, int, int]] = []
        planned, _ = make_planned(tmp_path, timed, largest=100)
        assert timed == []
        assert all(not planned.ways[plan].captured for plan in PLANS[1:])  # type: ignore[attr-defined]
        assert run_steps(planned, 100, 1000) == [SEQUENTIAL]

    def test_splits_far_from_the_best_are_given_up(self, tmp_path: Path) -> None:
        timed: list[tuple[str, int, int]] = []
        clock, statistics = Clock(), PipelineStatistics()
        ways: Any = {plan: FakeWay(plan, clock, statistics) for plan in PLANS}
        ways[PLANS[2]].slow = 3.0
        planned = PlannedDecode(ways, make_calibration(tmp_path, timed, 512), clock.event)
        planned.capture(show_progress=False)
        assert {batch for name, batch, _ in timed if name == PLANS[2].name} == {512}

    def test_a_hopeless_split_is_measured_at_its_ends_only(self, tmp_path: Path) -> None:
        timed: list[tuple[str, int, int]] = []
        clock, statistics = Clock(), PipelineStatistics()
        ways: Any = {plan: FakeWay(plan, clock, statistics) for plan in PLANS}
        ways[PLANS[1]].slow = 5.0  # first of them, so nothing but sequential decode is known yet
        planned = PlannedDecode(ways, make_calibration(tmp_path, timed, 512), clock.event)
        planned.capture(show_progress=False)
        contexts = [tokens // 512 for name, _, tokens in timed if name == PLANS[1].name]
        assert contexts[0] == 1
        assert len(contexts) == 2
        assert ways[PLANS[1]].captured == []
        assert PLANS[1] not in set(run_steps(planned, 512, 1000, 20))

    @pytest.mark.parametrize("largest", [1, 127, 128, 200, 512, 513, 1024, 3000])
    def test_sizes(self, largest: int) -> None:
        sizes, measured = pipelined_sizes(largest), measured_sizes(largest)
        assert set(measured) <= set(sizes)
        assert sizes == sorted(set(sizes))
        assert bool(sizes) == bool(measured) == (largest >= 128)
        if sizes:
            assert max(measured) == max(sizes) == largest
            assert min(measured) == min(sizes) >= 128


def test_calibrations_are_of_the_kernels_as_they_were(tmp_path: Path) -> None:
    kernel = tmp_path / "norm.py"
    kernel.write_text("a = 1", encoding="utf-8")
    before = hash_sources(tmp_path)
    (tmp_path / "norm.pyc").write_text("compiled", encoding="utf-8")
    assert hash_sources(tmp_path) == before
    kernel.write_text("a = 2", encoding="utf-8")
    changed = hash_sources(tmp_path)
    kernel.rename(tmp_path / "form.py")
    assert len({before, changed, hash_sources(tmp_path)}) == 3


@pytest.mark.parametrize("sms", range(16, 200, 2))
def test_splits_fill_the_device_with_multiples_of_8(sms: int) -> None:
    splits = splits_to_try(sms)
    assert len(splits) == len(set(splits)) >= 1
    for attention, ffn in splits:
        assert attention > 0
        assert ffn > 0
        assert ffn % 8 == 0
        assert attention + ffn == sms


def test_splits_of_a_device_that_is_known() -> None:
    assert splits_to_try(132) == [(28, 104), (36, 96), (44, 88), (52, 80), (60, 72)]
    assert splits_to_try(0) == []
