"""The map: every arm at every shape, batch and context.

One engine a shape, and on it all arms; then point after point, the arms in turn. A turn is short,
since there are many points: a first one captures graphs, compiles kernels, and tells how long steps
take; from that, how many steps a turn has and how many turns there are. All arms have the same
turns, over the same stretch of time, and of each the median of all steps counts.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from nanovllm.bench import BenchError, DoesNotFit, report
from nanovllm.bench.arms import Arm, Specs, arm_specs, plan_of_auto, timed_arms
from nanovllm.bench.gains import describe
from nanovllm.bench.pictures import draw_map as draw
from nanovllm.bench.pictures import heading
from nanovllm.bench.report import Record
from nanovllm.bench.shapes import SIZES, TINY
from nanovllm.bench.turns import (
    EDGE_STEPS,
    FEWEST_ROUNDS,
    DecodeWorkload,
    count_rounds,
    run_turns,
    start_arms,
    step_times,
)
from nanovllm.engine.llm_engine import LLMEngine

__all__ = ["describe", "draw", "run"]

BY_SIZE = [TINY, *SIZES]
TURN_SECONDS = 0.1
FEWEST_STEPS = 3
# Contexts grow with every step of a turn, so turns of fast steps are shorter than that.
MOST_STEPS = 60
# What the engine must have room for, whatever the turns will be; and the first turn.
LONGEST_OUTPUT = MOST_STEPS + 2 * EDGE_STEPS
FIRST_OUTPUT = 3 + 2 * EDGE_STEPS


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Measures the map and yields its record after each point, or reads it from files."""
    if args.stored is not None:
        yield read_map(args.stored)
        return
    specs = arm_specs(args)
    start = time.perf_counter()
    record = report.describe_machine(args.device, "map") | {"seconds_per_arm": args.seconds}
    shapes: list[Record] = []
    # Large batches first: other graphs fit into the memory of theirs.
    batches, contexts = sorted({*args.batches}, reverse=True), sorted({*args.contexts})
    places = [(batch, context) for batch in batches for context in contexts]
    with tqdm(desc="Map", total=len({*args.shapes}) * len(places), unit="point") as bar:
        for shape in sorted({*args.shapes}, key=BY_SIZE.index):
            bar.set_description(f"Map of {shape}")
            of_shape = argparse.Namespace(**vars(args) | {"shape": shape})
            for part in measure_shape(of_shape, specs, places, bar):
                seconds = time.perf_counter() - start
                yield record | {"sweep_seconds": seconds, "shapes": [*shapes, part]}
            shapes.append(part)
            gc.collect()
            if args.device.type == "cuda":
                torch.cuda.empty_cache()


def measure_shape(
    args: argparse.Namespace, specs: Specs, places: Sequence[tuple[int, int]], bar: tqdm[Any]
) -> Iterator[Record]:
    """The record of one shape after each point; without arms if not even its engine fits."""
    batches, contexts = zip(*places, strict=True)
    largest = DecodeWorkload(max(batches), max(contexts), LONGEST_OUTPUT)
    start = time.perf_counter()
    points: list[Record] = []
    try:
        with start_arms(args, specs, largest, must_fit=False) as (engine, arms, about):
            record = {
                "name": args.shape,
                **about,
                "kv_blocks": engine.model_runner.num_blocks,
                "arms": [arm.describe() for arm in arms],
            }
            for batch, context in places:
                bar.set_postfix_str(f"batch {batch}, context {context}")
                points.append(measure_point(engine, arms, batch, context, args.seconds))
                bar.update()
                seconds = time.perf_counter() - start
                yield record | {"seconds": seconds, "points": list(points)}
    except DoesNotFit as error:
        bar.update(len(places))
        missing = [unmeasured_point(*place, str(error)) for place in places]
        yield {"name": args.shape, "arms": [], "points": missing}


def measure_point(
    engine: LLMEngine, arms: Sequence[Arm], batch: int, context: int, seconds: float
) -> Record:
    """The record of one point: step times of all arms that do not fall back; auto's plan after."""
    try:
        DecodeWorkload(batch, context, LONGEST_OUTPUT).check_fits(engine)
    except DoesNotFit as error:
        return unmeasured_point(batch, context, str(error))
    timed = timed_arms(arms, batch)
    first = run_turns(engine, timed, DecodeWorkload(batch, context, FIRST_OUTPUT), 1)
    fastest = min(median(turn.seconds) for turn in first)
    output, rounds = plan_turns(fastest, seconds, len(timed))
    workload = DecodeWorkload(batch, context, output)
    return {
        "batch": batch,
        "context": context,
        "reason": None,
        "output": output,
        "arms": step_times(run_turns(engine, timed, workload, rounds)),
        "plan": plan_of_auto(timed),
    }


def plan_turns(step_seconds: float, seconds: float, num_arms: int) -> tuple[int, int]:
    """Steps of a turn, and rounds, for `seconds` of measured steps of the fastest arm.

    Its turn lasts `TURN_SECONDS`, if that is neither too few nor too many steps.
    """
    length = min(TURN_SECONDS, seconds / FEWEST_ROUNDS)
    steps = min(max(math.ceil(length / step_seconds), FEWEST_STEPS), MOST_STEPS)
    return steps + 2 * EDGE_STEPS, count_rounds(seconds, steps * step_seconds, num_arms)


def unmeasured_point(batch: int, context: int, reason: str) -> Record:
    """The record of a point that does not fit."""
    return {"batch": batch, "context": context, "reason": reason, "arms": {}}


def read_map(paths: Sequence[Path]) -> Record:
    """One map of the shapes of several files, by size; of a shape in two files the last counts.

    Each shape keeps the date and the seconds an arm of the file that it comes from.
    """
    records = [report.read_record(path, "map") for path in paths]
    try:
        joined = join_maps(paths, records)
        if not all([joined["shapes"], *(shape["points"] for shape in joined["shapes"])]):
            raise ValueError("there are no points")
        # Whatever is missing is found now, and not when half of it is printed.
        describe(joined)
        heading(joined, "")
    except BenchError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise BenchError(
            f"--from {' '.join(map(str, paths))} holds a damaged map: {error!r}"
        ) from error
    return joined


def join_maps(paths: Sequence[Path], records: Sequence[Record]) -> Record:
    """The map of several records, whose paths are for errors."""
    shapes: dict[str, Record] = {}
    for path, record in zip(paths, records, strict=True):
        for field in ("device", "versions"):
            if record[field] != records[0][field]:
                raise BenchError(f"--from {paths[0]} {path}: {field} differ, so they are no map")
        for shape in record["shapes"]:
            origin = {name: record[name] for name in ("date", "seconds_per_arm")}
            shapes[shape["name"]] = origin | shape
    return records[-1] | {
        "shapes": [shapes[name] for name in sorted(shapes, key=BY_SIZE.index)],
        "seconds_per_arm": min(record["seconds_per_arm"] for record in records),
        "sweep_seconds": sum(record["sweep_seconds"] for record in records),
    }
