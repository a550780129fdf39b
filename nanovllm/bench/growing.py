"""Sequences that grow: what each arm takes for the whole way from one context to another.

Thousands of steps an arm would take minutes. So the way is cut into ranges of contexts, and of each
only some steps in its middle are run; the median of their times stands for all steps of the range.
Ranges have equal ratios: with enough of them, the next one is near enough for a planner to see
contexts that grow, and not a jump. An arm runs all of its ranges before the next arm's turn, and
remains the same object, so what auto has learned in one range it knows in the next.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import median

from tqdm import tqdm

from nanovllm.bench import BenchError, report
from nanovllm.bench.arms import AUTO, Arm, specs_of
from nanovllm.bench.gains import short_label
from nanovllm.bench.report import Record
from nanovllm.bench.turns import (
    EDGE_STEPS,
    DecodeWorkload,
    in_order,
    run_turn,
    start_arms,
    timed_arms,
)
from nanovllm.engine.llm_engine import LLMEngine

# Auto keeps its promise if it takes at most this much longer than the best other arm.
TOLERANCE = 0.01
ESTIMATE = "sum over ranges of the median time of some steps in the middle times steps of the range"


def context_ranges(
    batch: int, context: int, until: int, stages: int, output: int
) -> list[tuple[int, DecodeWorkload]]:
    """Ranges from `context` to `until` tokens: their steps, and the turn that is run of them.

    A turn has `output` steps, of which the first and the last `EDGE_STEPS` do not count.
    """
    if until <= context:
        raise BenchError(f"until={until} must be above context={context}")
    bounds = [round(context * (until / context) ** (i / stages)) for i in range(stages + 1)]
    if min(end - begin for begin, end in pairwise(bounds)) < 1:
        raise BenchError(
            f"stages={stages} are too many: some have not one of the {until - context} steps from "
            f"{context} to {until} tokens"
        )
    middles = [max((begin + end - output) // 2, 1) for begin, end in pairwise(bounds)]
    steps = [end - begin for begin, end in pairwise(bounds)]
    works = [DecodeWorkload(batch, middle, output) for middle in middles]
    return list(zip(steps, works, strict=True))


# One sweep of an arm over all ranges: of each a step's median seconds, and the plan at its end.
Sweep = list[tuple[float, str | None]]
Ranges = Sequence[tuple[int, DecodeWorkload]]


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Measures all arms; yields the record after each round."""
    ranges = context_ranges(args.batch, args.context, args.until, args.stages, args.output)
    with start_arms(args, specs_of(args), ranges[-1][1]) as (engine, arms, about):
        base = (
            report.describe_machine(args.device, "growing")
            | about
            | {
                "batch": args.batch,
                "context": args.context,
                "until": args.until,
                "steps": args.until - args.context,
                "timed_steps": args.output - 2 * EDGE_STEPS,
                "estimate": ESTIMATE,
                "stages": [{"context": work.context, "steps": steps} for steps, work in ranges],
            }
        )
        for sweeps in run_sweeps(engine, timed_arms(arms, args.batch), ranges, args.rounds):
            records = [describe_arm(arm, ranges, sweeps.get(arm.label)) for arm in arms]
            seconds = {arm["label"]: arm["seconds"]["median"] for arm in records if arm["seconds"]}
            yield base | {"arms": records, **judge(seconds)}


def run_sweeps(
    engine: LLMEngine, arms: Sequence[Arm], ranges: Ranges, rounds: int
) -> Iterator[dict[str, list[Sweep]]]:
    """All sweeps so far by label, after each round."""
    sweeps: dict[str, list[Sweep]] = {arm.label: [] for arm in arms}
    for arm in tqdm(arms, "Warming up", unit="turn"):
        arm.activate()
        run_turn(engine, ranges[0][1])
    with tqdm(desc="Growing", total=rounds * len(arms) * len(ranges), unit="turn") as bar:
        for number in range(rounds):
            for arm in in_order(arms, number):
                bar.set_postfix_str(arm.label)
                arm.activate()
                sweep: Sweep = []
                for _, workload in ranges:
                    sweep.append((median(run_turn(engine, workload)), arm.plan))
                    bar.update()
                sweeps[arm.label].append(sweep)
            yield sweeps


def describe_arm(arm: Arm, ranges: Ranges, sweeps: Sequence[Sweep] | None) -> Record:
    """The record of an arm; without sweeps it fell back, and nothing of it is measured."""
    record: Record = arm.describe(ranges[0][1].batch)
    record |= dict.fromkeys(("stage_ms", "seconds", "plans"))
    if not sweeps:
        return record
    steps = [count for count, _ in ranges]
    once = [[seconds for seconds, _ in sweep] for sweep in sweeps]
    rounds = [sum(n * s for n, s in zip(steps, times, strict=True)) for times in once]
    record["stage_ms"] = [median(times) * 1e3 for times in zip(*once, strict=True)]
    record["seconds"] = {"best": min(rounds), "median": median(rounds), "rounds": rounds}
    plans = [[plan for _, plan in sweep] for sweep in sweeps]
    record["plans"] = plans if any(row[-1] is not None for row in plans) else None
    return record


def judge(seconds: Mapping[str, float]) -> Record:
    """The fastest arm but auto, auto's speed over it, and whether that is enough.

    `seconds` are those of the whole way, by label; without auto its fields are None.
    """
    fixed = {label: time for label, time in seconds.items() if label != AUTO}
    best = min(fixed, key=lambda label: fixed[label])
    of_best = fixed[best] / seconds[AUTO] if AUTO in seconds else None
    return {
        "best_fixed": best,
        "auto_of_best": of_best,
        "auto_holds": None if of_best is None else of_best >= 1 / (1 + TOLERANCE),
    }


def describe(record: Record) -> str:
    """Ranges as rows, arms as columns, the whole way below, and whether auto keeps its promise."""
    timed = [arm for arm in record["arms"] if arm["seconds"]]
    plans = next((a["plans"][-1] for a in timed if a["label"] == AUTO and a["plans"]), None)
    rows = [["context", "steps", *(short_label(arm["label"]) for arm in timed)]]
    for i, stage in enumerate(record["stages"]):
        times = [f"{arm['stage_ms'][i]:.3f}" for arm in timed]
        rows.append([str(stage["context"]), str(stage["steps"]), *times])
    if plans:
        names = ["auto's plan", *(short_label(plan or "-") for plan in plans)]
        rows = [[*row, name] for row, name in zip(rows, names, strict=True)]
    reference = timed[0]["seconds"]["median"]
    totals = [["whole way", *(short_label(arm["label"]) for arm in timed)]]
    for name in ("best", "median"):
        totals.append([f"{name}, s", *(f"{arm['seconds'][name]:.2f}" for arm in timed)])
    totals.append(["ratio", *(f"{reference / arm['seconds']['median']:.3f}" for arm in timed)])
    lines = [
        report.title(record),
        f"{record['batch']} sequences grow from {record['context']} to {record['until']} tokens "
        f"in {record['steps']:,} steps",
        f"ms/step: median of {record['timed_steps']} steps at each context, which stands for the "
        "steps around it",
        *report.fallbacks(record["arms"]),
        "",
        *report.table(rows),
        "",
        f"estimated from that, {len(timed[0]['seconds']['rounds'])} times:",
        *report.table(totals),
    ]
    if record["auto_of_best"] is not None:
        verdict = "kept" if record["auto_holds"] else "not kept"
        lines.append(
            f"{AUTO} is {record['auto_of_best']:.3f} times as fast as the best fixed arm, "
            f"{record['best_fixed']}; at most {TOLERANCE:.0%} slower: {verdict}"
        )
    return "\n".join(lines)
