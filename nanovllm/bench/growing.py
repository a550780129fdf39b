"""Sequences that grow: what each arm takes for the whole way from one context to another.

Thousands of steps an arm would take minutes. So the way is cut into ranges of contexts, and of each
only some steps in its middle are run; the median of their times stands for all steps of the range.
Ranges have equal ratios: with enough of them, the next one is near enough for a planner to see
contexts that grow, and not a jump.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator
from itertools import pairwise

from tqdm import tqdm

from nanovllm.bench import BenchError, report
from nanovllm.bench.arms import AUTO, arm_specs, plan_of_auto, timed_arms
from nanovllm.bench.gains import short_label
from nanovllm.bench.report import Record
from nanovllm.bench.shapes import SIZES
from nanovllm.bench.turns import EDGE_STEPS, DecodeWorkload, run_turns, start_arms, step_times

# Growing to 4096 tokens, 512 sequences have 240 GB of keys and values in the 28 layers of 0.6B.
LAYERS = 14
ROUNDS = 2  # in one an arm is first, in the other last


def context_ranges(
    batch: int, context: int, until: int, stages: int, output: int
) -> list[tuple[int, DecodeWorkload]]:
    """Ranges from `context` to `until` tokens: their steps, and the turn that is run of them.

    There are `stages` of them, or fewer if some would not have a step.
    """
    if until <= context:
        raise BenchError(f"--until {until} must be above --context {context}")
    if output >= 2 * context:  # a turn lies around the middle of its range
        raise BenchError(f"--output {output} must be below twice --context {context}")
    bounds = {round(context * (until / context) ** (i / stages)) for i in range(stages + 1)}
    return [
        (end - begin, DecodeWorkload(batch, (begin + end - output) // 2, output))
        for begin, end in pairwise(sorted(bounds))
    ]


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Measures all arms; yields the record after each range."""
    if args.layers is None and args.shape in SIZES:
        args.layers = LAYERS
    ranges = context_ranges(args.batch, args.context, args.until, args.stages, args.output)
    with start_arms(args, arm_specs(args), ranges[-1][1]) as (engine, arms, about):
        record = report.describe_machine(args.device, "growing") | about
        record |= {name: vars(args)[name] for name in ("batch", "context", "until")}
        record["turn_steps"] = args.output - 2 * EDGE_STEPS
        record |= {"arms": [arm.describe(args.batch) for arm in arms], "stages": []}
        timed = timed_arms(arms, args.batch)
        deque(run_turns(engine, timed, ranges[0][1], 1), maxlen=0)  # warms up
        for steps, workload in tqdm(ranges, "Growing", unit="range"):
            turns = list(run_turns(engine, timed, workload, ROUNDS))
            stage = {"context": workload.context, "steps": steps, "plan": plan_of_auto(timed)}
            record["stages"].append(stage | {"arms": step_times(turns)})
            yield record


def describe(record: Record) -> str:
    """Ranges as rows, arms as columns, the whole way below, and auto beside the best."""
    rows, seconds = [], dict[str, float]()
    for stage in record["stages"]:
        row = {name: stage[name] for name in ("context", "steps")}
        for label, times in stage["arms"].items():
            ms, label = times["step_ms"]["median"], short_label(label)
            row[label] = f"{ms:.3f}"
            seconds[label] = seconds.get(label, 0.0) + stage["steps"] * ms * 1e-3
        if AUTO in stage["arms"]:
            row["auto's plan"] = short_label(stage["plan"] or "-")
        rows.append(row)
    reference = next(iter(seconds.values()))
    totals = [
        {"whole way": "s"} | {label: f"{own:.2f}" for label, own in seconds.items()},
        {"whole way": "ratio"} | {label: f"{reference / s:.3f}" for label, s in seconds.items()},
    ]
    lines = [
        report.title(record),
        f"{record['batch']} sequences grow from {record['context']} to {record['until']} tokens",
        f"ms/step: median of turns of {record['turn_steps']} steps at each context, which stands "
        "for the steps around it",
        *report.fallbacks(record["arms"]),
        "",
        *report.table(rows),
        "",
        *report.table(totals),
    ]
    if len(seconds) > 1 and (auto := seconds.pop(AUTO, None)):
        best = min(seconds, key=lambda label: seconds[label])
        lines.append(f"auto is {seconds[best] / auto:.3f} times as fast as the best arm, {best}")
    return "\n".join(lines)
