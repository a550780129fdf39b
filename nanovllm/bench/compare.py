"""Measures arms against each other: in turn, in one run, each at the same contexts.

After a warm-up (graphs are captured and kernels compiled when first used), every round gives each
arm one turn, so that a device that gets warmer or slower does so under all arms alike. Every second
round is the one before it backwards, in which a steady drift cancels. An arm also finds the clocks
that the one before it has left behind, so the order changes, and there are as many rounds as it
takes until within them every arm has followed every other equally often.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from nanovllm.bench.arms import Arm
from nanovllm.bench.workload import DecodeWorkload, run_turn
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.stage_times import Span

WARM_UP_TURNS = 2
FEWEST_ROUNDS = 4

# The label of an arm, and the times of its steps in one turn, in seconds.
Turn = tuple[str, list[float]]


@dataclass(frozen=True)
class StepTimes:
    """Wall time of an arm's decode steps in seconds: median and quartiles of `count`."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, seconds: list[float]) -> StepTimes:
        low, middle, high = np.percentile(seconds, [25, 50, 75]).tolist()
        return cls(middle, low, high, len(seconds))


def compare(
    engine: LLMEngine,
    arms: Sequence[Arm],
    workload: DecodeWorkload,
    seconds: float,
    watch: Callable[[Iterator[Turn]], Iterator[Turn]] = iter,
) -> dict[str, StepTimes]:
    """Step times by label of all arms that do not fall back, from `seconds` of steps each.

    Args:
        watch: takes the turns and gives them on; for whoever wants to know when they were.
    """
    timed = timed_arms(arms, workload.batch)
    labels = [arm.label for arm in timed]
    turns = run_turns(engine, timed, workload, WARM_UP_TURNS)
    total = WARM_UP_TURNS * len(labels)
    # Of each arm, the last turn.
    lengths = {label: sum(times) for label, times in tqdm(turns, "Warming up", total, unit="turn")}
    rounds = count_rounds(seconds, min(lengths.values()), len(labels))
    turns = watch(run_turns(engine, timed, workload, rounds))
    return gather(tqdm(turns, "Measuring", rounds * len(labels), unit="turn"))


def timed_arms(arms: Sequence[Arm], batch: int) -> list[Arm]:
    """Those that run steps of `batch` sequences as asked for."""
    return [arm for arm in arms if arm.fallback_reason(batch) is None]


def count_rounds(seconds: float, turn_seconds: float, num_arms: int) -> int:
    """Rounds in which turns of at least `turn_seconds` fill `seconds`: not few, and balanced.

    That takes an even number, and a multiple of the arms, or of twice the arms if these are odd.
    """
    period = math.lcm(2, num_arms if num_arms % 2 == 0 else 2 * num_arms)
    return period * math.ceil(max(FEWEST_ROUNDS, seconds / turn_seconds) / period)


def run_turns(
    engine: LLMEngine, arms: Sequence[Arm], workload: DecodeWorkload, rounds: int
) -> Iterator[Turn]:
    """The arms in turn, each of them once a round."""
    prompts = workload.draw_prompts(engine.model_runner.model_config.vocab_size)
    for number in range(rounds):
        for arm in in_order(arms, number):
            arm.activate()
            yield arm.label, run_turn(engine, workload, prompts)


def in_order(arms: Sequence[Arm], number: int) -> Sequence[Arm]:
    """The arms as that round takes them: of five, abecd, dceba, bcade, edacb, and so on.

    Source: E. J. Williams, "Experimental designs balanced for the estimation of residual effects of
    treatments", 1949: a zigzag through the arms and its shifts.
    """
    count = len(arms)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]
    order = [arms[(step + number // 2) % count] for step in zigzag]
    return order[:: -1 if number % 2 else 1]


def gather(turns: Iterable[Turn]) -> dict[str, StepTimes]:
    """Step times by label, over all turns."""
    times: dict[str, list[float]] = defaultdict(list)
    for label, seconds in turns:
        times[label] += seconds
    return {label: StepTimes.of(seconds) for label, seconds in times.items()}


def profile_steps(engine: LLMEngine, arm: Arm, workload: DecodeWorkload) -> list[list[Span]]:
    """The stages of the last decode steps of a turn, timed; the arm is slower meanwhile."""
    prompts = workload.draw_prompts(engine.model_runner.model_config.vocab_size)
    arm.activate()
    configs = (engine.config, arm.step_runner.config)
    for config in configs:
        config.pipeline_enable_profiling = True
    try:
        run_turn(engine, workload, prompts)
    finally:
        for config in configs:
            config.pipeline_enable_profiling = False
    return list(arm.step_runner.statistics.recent)
