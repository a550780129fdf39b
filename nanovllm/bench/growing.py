"""Sequences that grow: what each arm takes for the whole way from one context to another.

    growth = Growth(batch=512, context=128, until=4096, stages=16, output=24)
    passages = run_passages(engine, arms, growth, rounds=2)
    record = growing_record(growth, arms, passages)

Thousands of steps an arm would take minutes. So the way is cut into stages, and of each only some
steps in its middle are run; the median of their times stands for all steps of the stage. Stages
have equal ratios: with enough of them, the next one is near enough for a planner to see contexts
that grow, and not a jump. An arm runs all of its stages before the next arm's turn, and remains the
same object, so what auto has learned at one stage it knows at the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from tqdm import tqdm

from nanovllm.bench import BenchError, report
from nanovllm.bench.arms import AUTO, Arm
from nanovllm.bench.compare import in_order, timed_arms
from nanovllm.bench.workload import EDGE_STEPS, DecodeWorkload, run_turn
from nanovllm.engine.llm_engine import LLMEngine

# Auto keeps its promise if it takes at most this much longer than the best other arm.
TOLERANCE = 0.01
ESTIMATE = "sum over stages of the median time of some steps in the middle times steps of the stage"


@dataclass(frozen=True)
class Stage:
    """A part of the way: `steps` steps, in whose place the turn `workload` is run."""

    steps: int
    workload: DecodeWorkload


@dataclass(frozen=True)
class Growth:
    """The way of `batch` sequences from `context` to `until` tokens, a step a token.

    Attributes:
        batch, context, until: as above.
        stages: parts into which it is cut.
        output: steps to run of each; the first and the last `EDGE_STEPS` do not count.

    Raises:
        BenchError: there are no such stages.
    """

    batch: int
    context: int
    until: int
    stages: int
    output: int

    def __post_init__(self) -> None:
        if self.until <= self.context:
            raise BenchError(f"until={self.until} must be above context={self.context}")
        if min(stage.steps for stage in self) < 1:
            raise BenchError(
                f"stages={self.stages} are too many: some have not one of the "
                f"{self.until - self.context} steps from {self.context} to {self.until} tokens"
            )

    def __iter__(self) -> Iterator[Stage]:
        """The stages, short contexts first."""
        ratio = self.until / self.context
        bounds = [round(self.context * ratio ** (i / self.stages)) for i in range(self.stages + 1)]
        for begin, end in pairwise(bounds):
            context = max((begin + end - self.output) // 2, 1)
            yield Stage(end - begin, DecodeWorkload(self.batch, context, self.output))

    @property
    def largest(self) -> DecodeWorkload:
        """The turn that needs the most room."""
        return list(self)[-1].workload


@dataclass(frozen=True)
class Passage:
    """One arm on the whole way, once: at each stage a step's median seconds, and the plan then."""

    step_seconds: list[float]
    plans: list[str | None]

    def seconds(self, growth: Growth) -> float:
        """What all steps would have taken."""
        return sum(s.steps * once for s, once in zip(growth, self.step_seconds, strict=True))


def run_passages(
    engine: LLMEngine, arms: Sequence[Arm], growth: Growth, rounds: int
) -> dict[str, list[Passage]]:
    """By label, as many passages as `rounds` of each arm that does not fall back."""
    timed = timed_arms(arms, growth.batch)
    passages: dict[str, list[Passage]] = {arm.label: [] for arm in timed}
    first = next(iter(growth)).workload
    for arm in tqdm(timed, "Warming up", unit="turn"):
        arm.activate()
        run_stage(engine, first)
    with tqdm(desc="Growing", total=rounds * len(timed) * growth.stages, unit="stage") as bar:
        for number in range(rounds):
            for arm in in_order(timed, number):
                bar.set_postfix_str(arm.label)
                arm.activate()
                passages[arm.label].append(run_passage(engine, arm, growth, bar))
    return passages


def run_passage(engine: LLMEngine, arm: Arm, growth: Growth, bar: tqdm[Any]) -> Passage:
    passage = Passage([], [])
    for stage in growth:
        passage.step_seconds.append(run_stage(engine, stage.workload))
        passage.plans.append(arm.plan)
        bar.update()
    return passage


def run_stage(engine: LLMEngine, workload: DecodeWorkload) -> float:
    """Median seconds of a step of one turn."""
    prompts = workload.draw_prompts(engine.model_runner.model_config.vocab_size)
    return median(run_turn(engine, workload, prompts))


def growing_record(
    growth: Growth, arms: Sequence[Arm], passages: Mapping[str, Sequence[Passage]]
) -> dict[str, Any]:
    """The JSON fields of what `run_passages` measured."""
    records = [arm_record(arm, growth, passages.get(arm.label)) for arm in arms]
    return {
        "batch": growth.batch,
        "context": growth.context,
        "until": growth.until,
        "steps": growth.until - growth.context,
        "timed_steps": growth.output - 2 * EDGE_STEPS,
        "estimate": ESTIMATE,
        "stages": [{"context": s.workload.context, "steps": s.steps} for s in growth],
        "arms": records,
        **judge_growing({r["label"]: r["seconds"]["median"] for r in records if r["seconds"]}),
    }


def arm_record(arm: Arm, growth: Growth, passages: Sequence[Passage] | None) -> dict[str, Any]:
    """One arm; without passages it fell back, and nothing of it is measured.

    "plans" holds, for each round, the plan in use at the end of each stage.
    """
    record: dict[str, Any] = {
        **report.describe_arm(arm),
        "fallback_reason": arm.fallback_reason(growth.batch),
        "stage_ms": None,
        "seconds": None,
        "plans": None,
    }
    if passages is None:
        return record
    rounds = [passage.seconds(growth) for passage in passages]
    by_stage = zip(*(passage.step_seconds for passage in passages), strict=True)
    record["stage_ms"] = [median(times) * 1e3 for times in by_stage]
    record["seconds"] = {"best": min(rounds), "median": median(rounds), "rounds": rounds}
    if any(passage.plans[-1] is not None for passage in passages):
        record["plans"] = [passage.plans for passage in passages]
    return record


def judge_growing(seconds: Mapping[str, float]) -> dict[str, Any]:
    """The fields that follow from the whole way's seconds by label.

    Returns:
        best_fixed: the fastest arm but auto.
        auto_of_best: speed of auto over it; None without auto.
        auto_holds: whether auto beats it, or nearly; None without auto.
    """
    fixed = {label: time for label, time in seconds.items() if label != AUTO}
    best = min(fixed, key=lambda label: fixed[label])
    of_best = fixed[best] / seconds[AUTO] if AUTO in seconds else None
    return {
        "best_fixed": best,
        "auto_of_best": of_best,
        "auto_holds": None if of_best is None else of_best >= 1 / (1 + TOLERANCE),
    }
