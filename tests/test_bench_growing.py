"""`bench_pipeline.py --workload growing`: on the CPU with the embedded model, and on made-up times.

Run with `pytest tests/test_bench_growing.py`; it takes some seconds.
"""

from __future__ import annotations

import json
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bench_pipeline
from nanovllm.bench import BenchError, command_line, growing
from nanovllm.bench.arms import Arm
from nanovllm.bench.growing import Growth, Passage, judge_growing, run_passages
from nanovllm.bench.growing_report import format_growing
from nanovllm.bench.workload import EDGE_STEPS
from nanovllm.engine.pipeline_statistics import PipelineStatistics

ARGV = ["--workload", "growing", "--device", "cpu"]
SMALL = ["--batch", "3", "--context", "10", "--until", "60", "--stages", "2", "--output", "6"]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[list[str], dict[str, Any]]:
    """The lines that are printed before the last, and the last, parsed."""
    bench_pipeline.main([*ARGV, *SMALL, *argv])
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


class TestStages:
    @pytest.mark.parametrize("seed", range(20))
    def test_stand_for_every_step_once_and_lie_in_their_middle(self, seed: int) -> None:
        rng = random.Random(seed)
        context = rng.randint(50, 300)
        until = context * rng.randint(2, 40)
        growth = Growth(8, context, until, rng.randint(1, 12), rng.randint(5, 30))
        begin = context
        for stage in growth:
            end = begin + stage.steps
            # A step reads at least one token more than there were.
            assert stage.workload.mean_context == pytest.approx((begin + end + 1) / 2, abs=0.6)
            assert stage.workload.output == growth.output
            begin = end
        assert begin == until

    def test_have_equal_ratios_without_jumps(self) -> None:
        stages = list(Growth(512, 128, 4096, 16, 24))
        assert sum(stage.steps for stage in stages) == 3968
        contexts = [stage.workload.mean_context for stage in stages]
        ratios = [b / a for a, b in pairwise(contexts)]
        assert ratios == pytest.approx([32 ** (1 / 16)] * 15, rel=0.01)

    def test_steps_times_their_times_are_the_whole_way(self) -> None:
        growth = Growth(2, 100, 200, 4, 6)
        steps = [stage.steps for stage in growth]
        assert Passage([1.0, 2.0, 3.0, 4.0], [None] * 4).seconds(growth) == pytest.approx(
            steps[0] + 2 * steps[1] + 3 * steps[2] + 4 * steps[3]
        )
        # Step times that grow in proportion are summed up all but exactly.
        exact = sum(range(101, 201))
        means = [stage.workload.mean_context for stage in growth]
        assert Passage(means, [None] * 4).seconds(growth) == pytest.approx(exact, rel=0.01)


class TestOnTheCpu:
    def test_table_and_record_agree(self, capsys: pytest.CaptureFixture[str]) -> None:
        lines, record = run(capsys, "--rounds", "3")
        assert lines == format_growing(record).splitlines()
        assert record["benchmark"] == "growing"
        assert (record["batch"], record["context"], record["until"]) == (3, 10, 60)
        assert (record["steps"], record["timed_steps"]) == (50, 6 - 2 * EDGE_STEPS)
        steps = [stage["steps"] for stage in record["stages"]]
        assert sum(steps) == 50
        arms = {arm["label"]: arm for arm in record["arms"]}
        assert list(arms) == ["sequential", "microbatch", "auto"]
        assert arms["auto"]["seconds"] is None
        assert "auto is not timed, falls back: pipeline_mode='auto' needs" in "\n".join(lines)
        for label in ("sequential", "microbatch"):
            seconds = arms[label]["seconds"]
            assert len(seconds["rounds"]) == 3
            assert seconds["best"] == min(seconds["rounds"])
            assert seconds["median"] == sorted(seconds["rounds"])[1]
            assert all(ms > 0 for ms in arms[label]["stage_ms"])
        assert record["best_fixed"] in ("sequential", "microbatch")
        assert record["auto_holds"] is record["auto_of_best"] is None

    def test_one_sequence_leaves_sequential_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        lines, record = run(capsys, "--batch", "1", "--rounds", "1")
        reason = record["arms"][1]["fallback_reason"]
        assert reason == "a batch of 1 is too small for 2 micro-batches"
        assert record["best_fixed"] == "sequential"
        assert any(line.split() == ["ratio", "1.000"] for line in lines)

    def test_autos_plan_is_recorded_at_every_stage(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        as_dict = PipelineStatistics.as_dict

        def planned(self: PipelineStatistics) -> dict[str, object]:
            # Auto has a turn of 6 steps to warm up, and two in each round.
            plan = "sequential" if self.steps["sequential"] <= 5 * 6 else "green 36+96"
            return as_dict(self) | {"planner": {"plan": plan, "switches": 1, "plans": {}}}

        # Auto falls back to sequential decode here, with statistics of its own.
        monkeypatch.setattr(PipelineStatistics, "as_dict", planned)
        monkeypatch.setattr(Arm, "fallback_reason", lambda self, batch: None)
        lines, record = run(capsys, "--modes", "auto", "--rounds", "3")
        auto = record["arms"][1]
        assert auto["plans"] == [
            ["sequential", "sequential"],
            ["sequential", "sequential"],
            ["green 36+96", "green 36+96"],
        ]
        (head,) = (i for i, line in enumerate(lines) if line.endswith("auto's plan"))
        assert [line.split()[-1] for line in lines[head + 1 : head + 3]] == ["36+96", "36+96"]
        assert lines[-1].startswith("auto is ")
        assert record["auto_of_best"] > 0


def test_arms_go_the_whole_way_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[str, int]] = []
    active: list[str] = []

    def arm(label: str) -> Any:
        return SimpleNamespace(
            label=label, plan=None, fallback_reason=lambda batch: None,
            activate=lambda: active.append(label),
        )  # fmt: skip

    def run_stage(engine: Any, workload: Any) -> float:
        turns.append((active[-1], workload.context))
        return 1.0

    monkeypatch.setattr(growing, "run_stage", run_stage)
    growth = Growth(4, 100, 400, 3, 8)
    engine: Any = None
    passages = run_passages(engine, [arm("a"), arm("b")], growth, rounds=2)
    contexts = [stage.workload.context for stage in growth]
    warm_up = [("a", contexts[0]), ("b", contexts[0])]
    assert turns == warm_up + [(label, context) for label in "abba" for context in contexts]
    assert {label: len(found) for label, found in passages.items()} == {"a": 2, "b": 2}
    assert passages["a"][0].seconds(growth) == 300


@pytest.mark.parametrize(
    ("seconds", "best", "holds"),
    [
        ({"sequential": 60.0, "green 36+96": 55.0, "auto": 54.0}, "green 36+96", True),
        ({"sequential": 60.0, "green 36+96": 55.0, "auto": 55.5}, "green 36+96", True),
        ({"sequential": 60.0, "green 36+96": 55.0, "auto": 55.6}, "green 36+96", False),
        ({"sequential": 50.0, "green 36+96": 55.0, "auto": 51.0}, "sequential", False),
        ({"sequential": 50.0, "green 36+96": 55.0}, "sequential", None),
    ],
)
def test_what_auto_promises(seconds: dict[str, float], best: str, holds: bool | None) -> None:
    verdict = judge_growing(seconds)
    assert verdict["best_fixed"] == best
    assert verdict["auto_holds"] is holds


class TestOptions:
    def test_on_a_gpu_the_longest_contexts_fit_into_its_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(command_line, "resolve_device", lambda name: torch.device("cuda", 0))
        args = command_line.make_parser(None).parse_args(["--workload", "growing"])
        command_line.complete(args)
        assert (args.shape, args.layers) == ("0.6B", 14)
        growth = Growth(args.batch, args.context, args.until, args.stages, args.output)
        assert (growth.batch, growth.context, growth.until) == (512, 128, 4096)
        block_bytes = 2 * 14 * 8 * 128 * 256 * 2
        assert growth.largest.blocks(256) * block_bytes < 110 * 2**30  # of an H200's 139

    def test_a_shape_that_is_asked_for_has_all_of_its_layers(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(command_line, "resolve_device", lambda name: torch.device("cuda", 0))
        for argv, layers in ((["--shape", "0.6B"], None), (["--layers", "28"], 28)):
            args = command_line.make_parser(None).parse_args(["--workload", "growing", *argv])
            command_line.complete(args)
            assert (args.shape, args.layers) == ("0.6B", layers)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--until", "10"], "until=10 must be above context=10"),
            (["--stages", "40"], "stages=40 are too many: some have not one of the 50 steps"),
            (["--output", "4"], "output=4 is not allowed: it must be at least 5"),
            (["--until", "9000"], "must be below the model's longest sequence, 4096 tokens"),
            (["--splits", "36+96"], "--splits needs green among --modes"),
            (["--seconds", "1"], "--seconds is an option of --workload decode and --map only"),
        ],
    )
    def test_bad_ones_say_why(
        self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            bench_pipeline.main([*ARGV, *SMALL, *argv])
        assert message in capsys.readouterr().err

    def test_belong_to_it_alone(self, capsys: pytest.CaptureFixture[str]) -> None:
        for option in ("--until", "--stages", "--rounds"):
            with pytest.raises(SystemExit):
                bench_pipeline.main(["--device", "cpu", option, "9"])
            assert f"{option} is an option of --workload growing only" in capsys.readouterr().err


def test_a_way_back_is_none() -> None:
    with pytest.raises(BenchError, match="until=100 must be above context=100"):
        Growth(4, 100, 100, 1, 8)
