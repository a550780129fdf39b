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
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm

from nanovllm.bench import BenchError, DoesNotFit, report
from nanovllm.bench.arms import AUTO, SEQUENTIAL, Arm, ArmSpec, specs_of
from nanovllm.bench.gains import describe, judge, summarize
from nanovllm.bench.pictures import draw_map as draw
from nanovllm.bench.report import Record
from nanovllm.bench.shapes import SIZES
from nanovllm.bench.turns import (
    EDGE_STEPS,
    FEWEST_ROUNDS,
    DecodeWorkload,
    count_rounds,
    gather,
    run_turns,
    start_arms,
    timed_arms,
)
from nanovllm.engine.llm_engine import LLMEngine

__all__ = ["describe", "draw", "run"]

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
    specs = specs_of(args)
    start = time.perf_counter()
    record = report.describe_machine(args.device, "map") | {"seconds_per_arm": args.seconds}
    shapes: list[Record] = []
    total = len(args.shapes) * len(args.batches) * len(args.contexts)
    with tqdm(desc="Map", total=total, unit="point") as bar:
        for shape in args.shapes:
            bar.set_description(f"Map of {shape}")
            for part in measure_shape(args, shape, specs, bar):
                seconds = time.perf_counter() - start
                record |= {"sweep_seconds": seconds, "shapes": [*shapes, part]}
                yield record | {"summary": summarize(record["shapes"])}
            shapes.append(part)
            gc.collect()
            if args.device.type == "cuda":
                torch.cuda.empty_cache()


def measure_shape(
    args: argparse.Namespace, shape: str, specs: Sequence[ArmSpec], bar: tqdm[Any]
) -> Iterator[Record]:
    """The record of one shape after each point; without arms if not even its engine fits."""
    largest = DecodeWorkload(max(args.batches), max(args.contexts), LONGEST_OUTPUT)
    # Large batches first: other graphs fit into the memory of theirs.
    places = [(batch, context) for batch in args.batches[::-1] for context in args.contexts]
    start = time.perf_counter()
    try:
        started = start_arms(args, specs, largest, must_fit=False, shape=shape)
        with started as (engine, arms, about):
            record = {
                "name": shape,
                **about,
                "kv_blocks": engine.model_runner.num_blocks,
                "arms": [arm.describe() for arm in arms],
            }
            points: list[Record] = []
            for batch, context in places:
                bar.set_postfix_str(f"batch {batch}, context {context}")
                points.append(measure_point(engine, arms, batch, context, args.seconds))
                bar.update()
                seconds = time.perf_counter() - start
                yield record | {"seconds": seconds, "points": list(points)}
    except DoesNotFit as error:
        bar.update(len(places))
        missing = [unmeasured_point(*place, str(error)) for place in places]
        yield {"name": shape, "arms": [], "points": missing}


def measure_point(
    engine: LLMEngine, arms: Sequence[Arm], batch: int, context: int, seconds: float
) -> Record:
    """The record of one point: step times of all arms that do not fall back, and their gains.

    "plan" is the one that auto has in use at the end, if it has a planner, and "plan_steps" says
    how many steps of its turns ran by which.
    """
    try:
        DecodeWorkload(batch, context, LONGEST_OUTPUT).check_fits(engine)
    except DoesNotFit as error:
        return unmeasured_point(batch, context, str(error))
    timed = timed_arms(arms, batch)
    first = run_turns(engine, timed, DecodeWorkload(batch, context, FIRST_OUTPUT), 1)
    output, rounds = plan_turns(min(median(times) for _, times in first), seconds, len(timed))
    auto = next((arm for arm in timed if arm.mode == AUTO), None)
    before = Counter(auto.plan_steps if auto else {})
    turns = run_turns(engine, timed, DecodeWorkload(batch, context, output), rounds)
    (times,) = gather(turns, rounds * len(timed))
    return {
        "batch": batch,
        "context": context,
        "reason": None,
        "output": output,
        "arms": {arm.label: times[arm.label] for arm in timed},
        "plan": auto.plan if auto else None,
        "plan_steps": dict(Counter(auto.plan_steps if auto else {}) - before),
        **judge({label: of["step_ms"]["median"] for label, of in times.items()}),
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
    point: Record = {"batch": batch, "context": context, "reason": reason, "output": None}
    return point | {"arms": {}, "plan": None, "plan_steps": {}} | judge({SEQUENTIAL: 1.0})


def read_map(paths: Sequence[Path]) -> Record:
    """One map of several files: all their shapes by size, and of a point in two files the last.

    Each shape keeps the date and the seconds an arm of the file that it comes from."""
    records = [report.read_record(path, "map") for path in paths]
    shapes: dict[str, Record] = {}
    for path, record in zip(paths, records, strict=True):
        for field in ("device", "versions"):
            if record[field] != records[0][field]:
                raise BenchError(f"--from {paths[0]} {path}: {field} differ, so they are no map")
        for shape in record["shapes"]:
            dated = {key: record[key] for key in ("date", "seconds_per_arm")} | shape
            old = shapes.get(shape["name"])
            shapes[shape["name"]] = join(old, dated) if old else dated
    order = [name for name in shapes if name not in SIZES] + list(SIZES)
    by_size = sorted(shapes.values(), key=lambda shape: order.index(shape["name"]))
    return records[-1] | {
        "shapes": by_size,
        "seconds_per_arm": min(record["seconds_per_arm"] for record in records),
        "sweep_seconds": sum(record["sweep_seconds"] for record in records),
        "summary": summarize(by_size),
    }


def join(old: Record, new: Record) -> Record:
    """The arms, in the new order, and the points of both."""
    if "model" in old and "model" in new and old["model"]["layers"] != new["model"]["layers"]:
        raise BenchError(f"--from: {new['name']} does not have as many layers in all files")
    points = {(p["batch"], p["context"]): p for p in [*old["points"], *new["points"]]}
    arms = {arm["label"]: arm for arm in [*new["arms"], *old["arms"]]}
    arms |= {arm["label"]: arm for arm in new["arms"]}
    return old | new | {"arms": list(arms.values()), "points": list(points.values())}
