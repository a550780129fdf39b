"""Sequences that grow: what each arm takes for the whole way from one context to another.

Thousands of steps an arm would take minutes. So the way is cut into ranges of contexts, and of each
only some steps in its middle are run; the median of their times stands for all steps of the range.
Ranges have equal ratios: with enough of them, the next one is near enough for a planner to see
contexts that grow, and not a jump. An arm runs all of its ranges before the next arm's turn, and
remains the same object, so what auto has learned in one range it knows in the next.
"""

from __future__ import annotations

import argparse
from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import pairwise
from statistics import median

from tqdm import tqdm

from nanovllm.bench import BenchError, report
from nanovllm.bench.arms import AUTO, Arm, arm_specs, timed_arms
from nanovllm.bench.gains import short_label
from nanovllm.bench.report import Record
from nanovllm.bench.shapes import SIZES
from nanovllm.bench.turns import EDGE_STEPS, DecodeWorkload, run_turns, start_arms

# Growing to 4096 tokens, 512 sequences have 240 GB of keys and values in the 28 layers of 0.6B.
LAYERS = 14
# Of a turn: a step's median time in ms, and the plan at the end.
Sample = tuple[float, str | None]


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
    """Measures all arms; yields the record after each turn."""
    if args.layers is None and args.shape in SIZES:
        args.layers = LAYERS
    ranges = context_ranges(args.batch, args.context, args.until, args.stages, args.output)
    workloads = [workload for _, workload in ranges]
    with start_arms(args, arm_specs(args), workloads[-1]) as (engine, arms, about):
        record = report.describe_machine(args.device, "growing") | about
        record |= {name: vars(args)[name] for name in ("batch", "context", "until")}
        record["timed_steps"] = args.output - 2 * EDGE_STEPS
        record["stages"] = [{"context": w.context, "steps": steps} for steps, w in ranges]
        timed = timed_arms(arms, args.batch)
        deque(run_turns(engine, timed, workloads[:1], 1), maxlen=0)  # warms up
        turns = run_turns(engine, timed, workloads, args.rounds)
        count = args.rounds * len(timed) * len(ranges)
        samples: dict[str, list[Sample]] = defaultdict(list)
        for turn in tqdm(turns, "Growing", count, unit="turn"):
            samples[turn.arm.label].append((median(turn.seconds) * 1e3, turn.arm.plan))
            yield record | {"arms": [describe_arm(a, record, samples[a.label]) for a in arms]}


def describe_arm(arm: Arm, record: Record, turns: list[Sample]) -> Record:
    """The record of an arm; without turns it fell back, or has not had one yet.

    It has the ranges that were run, and `seconds` once these are all.
    """
    described = arm.describe(record["batch"])
    if not turns:
        return described
    # Turn after turn, a sweep over all ranges a round.
    stages = record["stages"]
    by_range = [turns[i :: len(stages)] for i in range(min(len(stages), len(turns)))]
    ms = [median(ms for ms, _ in turns) for turns in by_range]
    described |= {"stage_ms": ms, "plans": [turns[-1][1] for turns in by_range]}
    if len(ms) == len(stages):
        steps = [stage["steps"] for stage in stages]
        described["seconds"] = sum(a * b * 1e-3 for a, b in zip(steps, ms, strict=True))
    return described


def describe(record: Record) -> str:
    """Ranges as rows, arms as columns, the whole way below, and auto beside the best."""
    timed = {short_label(arm["label"]): arm for arm in record["arms"] if "stage_ms" in arm}
    rows = []
    for i, stage in enumerate(record["stages"]):
        run = {label: arm for label, arm in timed.items() if i < len(arm["stage_ms"])}
        row = stage | {label: f"{arm['stage_ms'][i]:.3f}" for label, arm in run.items()}
        if AUTO in run:
            row["auto's plan"] = short_label(run[AUTO]["plans"][i] or "-")
        rows.append(row)
    seconds = {label: arm["seconds"] for label, arm in timed.items() if "seconds" in arm}
    reference = next(iter(seconds.values()), 0.0)
    totals = [
        {"whole way": "s"} | {label: f"{own:.2f}" for label, own in seconds.items()},
        {"whole way": "ratio"} | {label: f"{reference / s:.3f}" for label, s in seconds.items()},
    ]
    lines = [
        report.title(record),
        f"{record['batch']} sequences grow from {record['context']} to {record['until']} tokens",
        f"ms/step: median of {record['timed_steps']} steps at each context, which stands for the "
        "steps around it",
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
