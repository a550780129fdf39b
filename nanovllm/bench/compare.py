"""Measures arms against each other: in turn, in one run, each at the same contexts.

After a warm-up (graphs are captured and kernels compiled when first used), every round gives each
arm one turn; every second round goes backwards, so that no arm always follows the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from nanovllm.bench.arms import Arm
from nanovllm.bench.workload import DecodeWorkload, run_turn
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.stage_marks import Span

WARM_UP_TURNS = 2
FEWEST_ROUNDS = 3


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
    engine: LLMEngine, arms: list[Arm], workload: DecodeWorkload, seconds: float
) -> dict[str, StepTimes]:
    """Step times by mode of all arms that do not fall back, from `seconds` of steps each."""
    prompts = workload.draw_prompts(engine.model_runner.model_config.vocab_size)

    def turn(arm: Arm) -> list[float]:
        arm.activate()
        return run_turn(engine, workload, prompts)

    timed = [arm for arm in arms if arm.fallback_reason(workload.batch) is None]
    with tqdm(desc="Warming up", total=WARM_UP_TURNS * len(timed), unit="turn") as bar:
        for _ in range(WARM_UP_TURNS):
            lengths = []
            for arm in timed:
                lengths.append(sum(turn(arm)))
                bar.update()
    rounds = max(FEWEST_ROUNDS, math.ceil(seconds / min(lengths)))
    times: dict[str, list[float]] = {arm.mode: [] for arm in timed}
    with tqdm(desc="Measuring", total=rounds * len(timed), unit="turn") as bar:
        for number in range(rounds):
            for arm in timed[:: -1 if number % 2 else 1]:
                times[arm.mode] += turn(arm)
                bar.update()
    return {mode: StepTimes.of(seconds) for mode, seconds in times.items()}


def profile_steps(engine: LLMEngine, arm: Arm, workload: DecodeWorkload) -> list[list[Span]]:
    """The stages of the last decode steps of a turn, timed; the arm is slower meanwhile."""
    prompts = workload.draw_prompts(engine.model_runner.model_config.vocab_size)
    arm.activate()
    configs = (engine.config, arm.decode.config)
    for config in configs:
        config.pipeline_enable_profiling = True
    try:
        run_turn(engine, workload, prompts)
    finally:
        for config in configs:
            config.pipeline_enable_profiling = False
    return list(arm.decode.pipeline.statistics.recent)
