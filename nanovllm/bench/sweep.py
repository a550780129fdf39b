"""The map: every arm at every shape, batch and context.

One engine a shape, and on it all arms; then point after point, the arms in turn. A turn is short,
since there are many points: a first one captures graphs, compiles kernels, and tells how long steps
take; from that, how many steps a turn has and how many turns there are. All arms have the same
turns, over the same stretch of time, and of each the median of all steps counts.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from nanovllm.bench import DoesNotFit, report
from nanovllm.bench.arms import AUTO, SEQUENTIAL, Arm, ArmSpec, open_arms
from nanovllm.bench.compare import (
    FEWEST_ROUNDS,
    StepTimes,
    count_rounds,
    gather,
    run_turns,
    timed_arms,
)
from nanovllm.bench.engines import start_engine
from nanovllm.bench.gains import judge, summarize
from nanovllm.bench.workload import EDGE_STEPS, DecodeWorkload, fill_cache, room_options
from nanovllm.engine.llm_engine import LLMEngine

BENCHMARK = "map"
TURN_SECONDS = 0.1
FEWEST_STEPS = 3
# Contexts grow with every step of a turn, so turns of fast steps are shorter than that.
MOST_STEPS = 60
# What the engine must have room for, whatever the turns will be.
LONGEST_OUTPUT = MOST_STEPS + 2 * EDGE_STEPS
# Of the first turn.
FIRST_OUTPUT = 3 + 2 * EDGE_STEPS


@dataclass(frozen=True)
class Grid:
    """What to measure.

    Attributes:
        shapes: names in `SIZES`, or "tiny".
        layers: so many of each shape; None: all.
        batches, contexts: sequences, and tokens of each at the beginning of a turn; rising.
        specs: the arms; sequential is the first.
        seconds: of steps for each arm at each point, at least.
    """

    shapes: Sequence[str]
    layers: int | None
    batches: Sequence[int]
    contexts: Sequence[int]
    specs: Sequence[ArmSpec]
    seconds: float

    @property
    def points(self) -> Iterator[tuple[int, int]]:
        """Batch and context; large batches first: other graphs fit into the memory of theirs."""
        return ((batch, context) for batch in self.batches[::-1] for context in self.contexts)


def sweep(
    grid: Grid, device: torch.device, options: dict[str, Any], keep: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """Measures all points; returns the map's record.

    Args:
        grid: what to measure.
        device: where.
        options: further fields of the engines' `Config`.
        keep: is given the record so far after each shape, so that no accident loses it all.
    """
    start = time.perf_counter()
    record = report.describe_machine(device, BENCHMARK) | {"seconds_per_arm": grid.seconds}
    shapes: list[dict[str, Any]] = []
    total = len(grid.shapes) * len(grid.batches) * len(grid.contexts)
    with tqdm(desc="Map", total=total, unit="point") as bar:
        for shape in grid.shapes:
            bar.set_description(f"Map of {shape}")
            shapes.append(sweep_shape(grid, shape, device, options, bar))
            free_memory(device)
            record |= {"sweep_seconds": time.perf_counter() - start, "shapes": shapes}
            keep(record | {"summary": summarize(shapes)})
    return record | {"summary": summarize(shapes)}


def sweep_shape(
    grid: Grid, shape: str, device: torch.device, options: dict[str, Any], bar: tqdm[Any]
) -> dict[str, Any]:
    """The record of one shape; without arms if not even its engine fits."""
    largest = DecodeWorkload(max(grid.batches), max(grid.contexts), LONGEST_OUTPUT)
    options = options | room_options(device, largest.batch, largest.max_len)
    start = time.perf_counter()
    try:
        with start_engine(shape, grid.layers, None, **options) as started:
            engine = started.engine
            fill_cache(engine)
            with open_arms(engine, grid.specs) as arms:
                points = [
                    measure_point(engine, arms, *point, grid.seconds, bar) for point in grid.points
                ]
                return {
                    "name": shape,
                    **report.describe_engine(started),
                    "kv_blocks": engine.model_runner.num_blocks,
                    "seconds": time.perf_counter() - start,
                    "arms": [report.describe_arm(arm) for arm in arms],
                    "points": points,
                }
    except DoesNotFit as error:
        points = [unmeasured_point(*point, str(error)) for point in grid.points]
        bar.update(len(points))
        return {"name": shape, "arms": [], "points": points}


def measure_point(
    engine: LLMEngine, arms: Sequence[Arm], batch: int, context: int, seconds: float, bar: tqdm[Any]
) -> dict[str, Any]:
    """The record of one point: step times of all arms that do not fall back, and their gains.

    "plan" is the one that auto has in use at the end, if it has a planner, and "plan_steps" says
    how many steps of its turns ran by which.
    """
    bar.set_postfix_str(f"batch {batch}, context {context}")
    try:
        DecodeWorkload(batch, context, LONGEST_OUTPUT).check_fits(engine)
    except DoesNotFit as error:
        bar.update()
        return unmeasured_point(batch, context, str(error))
    timed = timed_arms(arms, batch)
    shortest = DecodeWorkload(batch, context, FIRST_OUTPUT)
    first = gather(run_turns(engine, timed, shortest, 1))
    output, rounds = plan_turns(min(t.median for t in first.values()), seconds, len(timed))
    workload = DecodeWorkload(batch, context, output)
    auto = next((arm for arm in timed if arm.mode == AUTO), None)
    before = Counter(auto.plan_steps if auto else {})
    times = gather(run_turns(engine, timed, workload, rounds))
    bar.update()
    return {
        "batch": batch,
        "context": context,
        "reason": None,
        "output": output,
        "arms": {arm.label: times_record(times[arm.label]) for arm in timed},
        "plan": auto.plan if auto else None,
        "plan_steps": dict(Counter(auto.plan_steps if auto else {}) - before),
        **judge({arm.label: times[arm.label].median * 1e3 for arm in timed}),
    }


def plan_turns(step_seconds: float, seconds: float, num_arms: int) -> tuple[int, int]:
    """Steps of a turn, and rounds, for `seconds` of measured steps of the fastest arm.

    Its turn lasts `TURN_SECONDS`, if that is neither too few nor too many steps.

    Args:
        step_seconds: of the fastest arm.
        seconds: that it is to be measured.
        num_arms: that take turns.
    """
    length = min(TURN_SECONDS, seconds / FEWEST_ROUNDS)
    steps = min(max(math.ceil(length / step_seconds), FEWEST_STEPS), MOST_STEPS)
    return steps + 2 * EDGE_STEPS, count_rounds(seconds, steps * step_seconds, num_arms)


def times_record(times: StepTimes) -> dict[str, Any]:
    step_ms = {"median": times.median, "q1": times.low, "q3": times.high}
    return {
        "steps": times.count,
        "step_ms": {name: seconds * 1e3 for name, seconds in step_ms.items()},
    }


def unmeasured_point(batch: int, context: int, reason: str) -> dict[str, Any]:
    """The record of a point that does not fit."""
    nothing = judge({SEQUENTIAL: 1.0})
    return {
        "batch": batch,
        "context": context,
        "reason": reason,
        "output": None,
        "arms": {},
        "plan": None,
        "plan_steps": {},
        **nothing,
    }


def free_memory(device: torch.device) -> None:
    """Gives back what the engine of a finished shape has held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
