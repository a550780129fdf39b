"""Mode "auto" on the CPU: calibration and the planner's choices, with a fake clock.

The device is simulated: a step takes what a formula says, for sequential decode the sum of
attention and dense work, for a pipeline the longer of the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm.engine.calibration import (
    Calibration,
    hash_sources,
    measured_sizes,
    pipelined_sizes,
)
from nanovllm.engine.cuda_graphs import batch_sizes
from nanovllm.engine.pipeline_statistics import PipelineStatistics
from nanovllm.engine.plan import SEQUENTIAL, Plan
from nanovllm.engine.planned_decode import AutoPlan, plans_to_try, splits_to_try
from nanovllm.engine.step_runner import Choice
from nanovllm.utils.disk_cache import DiskCache

ATTENTION_SECONDS = 1e-8  # a token on the whole device
DENSE_SECONDS = 1e-5  # a sequence, with a floor: the time to read the weights
WEIGHTS_SECONDS = 1e-3
CAPACITY = 600_000


def step_seconds(plan: Plan, batch: int, tokens: float) -> float:
    """What a step takes on the simulated device."""
    attention = ATTENTION_SECONDS * tokens
    if plan == SEQUENTIAL:
        return attention + max(DENSE_SECONDS * batch, WEIGHTS_SECONDS)
    attention_sms, ffn_sms = (lane.sms or 0 for lane in plan.lanes)
    dense = 2 * max(DENSE_SECONDS * batch / 2, WEIGHTS_SECONDS) * 132 / ffn_sms
    return max(attention * max(1.0, 44 / attention_sms), dense)


class FakeRunner:
    """A step runner whose steps take `step_seconds`, times what `slow` says of their plan.

    Attributes:
        captured: sizes by plan.
        now: the device's clock.
    """

    def __init__(self, plans: list[Plan], largest: int) -> None:
        self.plans = plans
        self.schedulers = [SimpleNamespace(plan=plan) for plan in plans]
        self.memory = SimpleNamespace(sizes=batch_sizes(largest))
        self.slow = dict.fromkeys(plans, 1.0)
        self.captured: dict[Plan, list[int]] = {plan: [] for plan in plans}
        self.statistics = PipelineStatistics()
        self.now = 0.0

    def capture(self, choices: Iterable[Choice], *, show_progress: bool) -> None:
        for choice in choices:
            self.captured[self.plans[choice.plan]].append(choice.size)

    def seconds(self, plan: Plan, batch: int, tokens: float) -> float:
        return self.slow[plan] * step_seconds(plan, batch, tokens)

    def run(self, choice: Choice, num_seqs: int, tokens: int) -> float:
        plan = self.plans[choice.plan]
        assert choice.size in self.captured[plan], "a capture on the hot path"
        self.statistics.count_step(num_seqs, pipelined=choice.plan > 0)
        seconds = self.seconds(plan, choice.size, tokens)
        self.now += seconds
        return seconds


PLANS = [SEQUENTIAL, *plans_to_try(132)]
Timed = list[tuple[str, int, int]]  # plan, batch and tokens of steps that were measured


def make_auto(
    cache: Path,
    timed: Timed | None = None,
    largest: int = 512,
    slow: dict[Plan, float] | None = None,
) -> tuple[AutoPlan, FakeRunner]:
    runner = FakeRunner(PLANS, largest)
    runner.slow.update(slow or {})

    def timer(plan: int, batch: int, tokens: int) -> float:
        if timed is not None:
            timed.append((PLANS[plan].name, batch, tokens))
        return runner.seconds(PLANS[plan], batch, tokens)

    weight_tokens = WEIGHTS_SECONDS / ATTENTION_SECONDS
    calibration = Calibration(
        timer, largest, CAPACITY, 4096, weight_tokens, {"device": "fake"}, DiskCache("plans", cache)
    )
    as_runner: Any = runner
    auto = AutoPlan(as_runner, calibration)
    auto.capture(as_runner, show_progress=False)
    return auto, runner


def run_steps(made: tuple[AutoPlan, FakeRunner], batch: int, context: int, steps: int = 1):
    """Runs steps of equal sequences; returns their plans."""
    auto, runner = made
    plans = []
    for _ in range(steps):
        choice = auto.choose(batch, batch * context)
        seconds = runner.run(choice, batch, batch * context)
        if choice.prediction is not None:
            auto.observe(choice.prediction, seconds)
        plans.append(PLANS[choice.plan])
    return plans


def seconds_of(runner: FakeRunner, plan: Plan, batch: int, context: int) -> float:
    """What a step takes on the smallest graph of a plan that holds it."""
    sizes = [size for size in runner.captured[plan] if size >= batch]
    return step_seconds(plan, min(sizes), batch * context) if sizes else float("inf")


class TestChoosing:
    @pytest.mark.parametrize("batch", [1, 8, 100, 256, 400, 512])
    @pytest.mark.parametrize("context", [16, 128, 512, 1024])
    def test_takes_the_fastest_captured_plan(
        self, tmp_path: Path, batch: int, context: int
    ) -> None:
        made = make_auto(tmp_path)
        chosen = run_steps(made, batch, context, 8)[-1]
        times = {plan: seconds_of(made[1], plan, batch, context) for plan in PLANS}
        assert times[chosen] <= 1.02 * min(times.values()), chosen.name

    def test_pipelines_pay_where_attention_and_dense_work_are_alike(self, tmp_path: Path) -> None:
        made = make_auto(tmp_path)
        assert run_steps(made, 512, 1000, 8)[-1].mode == "green"
        assert run_steps(made, 8, 1000, 8)[-1] == SEQUENTIAL
        assert run_steps(made, 512, 16, 8)[-1] == SEQUENTIAL

    def test_growing_contexts_change_the_plan(self, tmp_path: Path) -> None:
        made = make_auto(tmp_path)
        plans = [run_steps(made, 512, context)[0] for context in range(16, 1170, 2)]
        assert plans[0] == SEQUENTIAL
        assert len(set(plans)) >= 3
        for plan in PLANS:
            fixed = sum(step_seconds(plan, 512, 512 * context) for context in range(16, 1170, 2))
            assert made[1].now < 1.01 * fixed, plan.name

    def test_leaves_a_plan_that_disappoints(self, tmp_path: Path) -> None:
        made = make_auto(tmp_path)
        first = run_steps(made, 512, 1000, 8)[-1]
        made[1].slow[first] = 1.5
        assert run_steps(made, 512, 1000, 60)[-1] != first

    def test_the_statistics_name_plan_and_times(self, tmp_path: Path) -> None:
        made = make_auto(tmp_path)
        run_steps(made, 512, 1000, 10)
        statistics = made[1].statistics
        record: Any = statistics.as_dict()["planner"]
        assert statistics.mode == "auto"
        assert statistics.attention_sms is None
        assert record["plan"].startswith("green")
        used = record["plans"][record["plan"]]
        assert used["measured_ms"] == pytest.approx(used["predicted_ms"], rel=0.02)
        assert f"Plan: {record['plan']} (switched" in statistics.format()
        assert statistics.steps["pipelined"] == used["steps"]

    def test_steps_without_a_prediction_are_not_timed(self, tmp_path: Path) -> None:
        auto, _ = made = make_auto(tmp_path)
        assert auto.choose(8, 800).prediction is None
        assert auto.choose(512, 51200).prediction is not None
        run_steps(made, 8, 100)


class TestCalibration:
    def test_a_second_engine_measures_nothing(self, tmp_path: Path) -> None:
        timed: Timed = []
        first, runner = make_auto(tmp_path, timed)
        assert timed
        count = len(timed)
        second, other = make_auto(tmp_path, timed)
        assert len(timed) == count
        assert second.calibration.table.to_json() == first.calibration.table.to_json()
        assert other.captured == runner.captured

    def test_takes_few_steps(self, tmp_path: Path) -> None:
        timed: Timed = []
        make_auto(tmp_path, timed, largest=1024)
        assert len(timed) < 110

    def test_hopeless_batches_are_neither_measured_nor_captured(self, tmp_path: Path) -> None:
        timed: Timed = []
        made = make_auto(tmp_path, timed, largest=100)
        assert timed == []
        assert all(not made[1].captured[plan] for plan in PLANS[1:])
        assert run_steps(made, 100, 1000) == [SEQUENTIAL]

    def test_splits_far_from_the_best_are_given_up(self, tmp_path: Path) -> None:
        timed: Timed = []
        make_auto(tmp_path, timed, slow={PLANS[2]: 3.0})
        assert {batch for name, batch, _ in timed if name == PLANS[2].name} == {512}

    def test_a_hopeless_split_is_measured_at_its_ends_only(self, tmp_path: Path) -> None:
        timed: Timed = []
        # The first of them, so nothing but sequential decode is known yet.
        made = make_auto(tmp_path, timed, slow={PLANS[1]: 5.0})
        contexts = [tokens // 512 for name, _, tokens in timed if name == PLANS[1].name]
        assert contexts[0] == 1
        assert len(contexts) == 2
        assert made[1].captured[PLANS[1]] == []
        assert PLANS[1] not in set(run_steps(made, 512, 1000, 20))

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
