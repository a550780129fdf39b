"""Growing sequences as a table: stages as rows, arms as columns, and the whole way below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanovllm.bench.arms import AUTO
from nanovllm.bench.growing import TOLERANCE
from nanovllm.bench.map_report import PLAN_TITLE, PLAN_WIDTH, short_label
from nanovllm.bench.report import format_title

LEFT_WIDTH = 16


def format_growing(record: dict[str, Any]) -> str:
    """The table, and whether auto keeps its promise."""
    timed = [arm for arm in record["arms"] if arm["seconds"] is not None]
    widths = [max(len(short_label(arm["label"])), 7) + 2 for arm in timed]
    plans = last_plans(timed)
    head = f"{'context':>8}{'steps':>8}" + row([short_label(arm["label"]) for arm in timed], widths)
    return "\n".join(
        [
            format_title(record),
            f"{record['batch']} sequences grow from {record['context']} to {record['until']} "
            f"tokens in {record['steps']:,} steps",
            f"ms/step: median of {record['timed_steps']} steps at each context, which stands for "
            "the steps around it",
            *(
                f"{arm['label']} is not timed, falls back: {arm['fallback_reason']}"
                for arm in record["arms"]
                if arm["seconds"] is None
            ),
            "",
            head + (f"{PLAN_TITLE:>{PLAN_WIDTH}}" if plans else ""),
            *(format_stage(record, i, timed, widths, plans) for i in range(len(record["stages"]))),
            *format_totals(timed, widths),
            *format_verdict(record),
        ]
    )


def last_plans(timed: Sequence[dict[str, Any]]) -> list[str | None]:
    """The plan of auto at each stage in the last round; none without a planner."""
    return next((a["plans"][-1] for a in timed if a["label"] == AUTO and a["plans"]), [])


def row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def format_stage(
    record: dict[str, Any],
    index: int,
    timed: Sequence[dict[str, Any]],
    widths: Sequence[int],
    plans: Sequence[str | None],
) -> str:
    """The row of a stage: step times, and auto's plan."""
    stage = record["stages"][index]
    line = f"{stage['context']:>8}{stage['steps']:>8}"
    line += row([f"{arm['stage_ms'][index]:.3f}" for arm in timed], widths)
    return line + (f"{short_label(plans[index] or '-'):>{PLAN_WIDTH}}" if plans else "")


def format_totals(timed: Sequence[dict[str, Any]], widths: Sequence[int]) -> list[str]:
    """Rows of the whole way: seconds, and speed over sequential, which is the first arm."""
    rounds = len(timed[0]["seconds"]["rounds"])
    reference = timed[0]["seconds"]["median"]
    cells = {
        "best, s": [f"{arm['seconds']['best']:.2f}" for arm in timed],
        "median, s": [f"{arm['seconds']['median']:.2f}" for arm in timed],
        "ratio": [f"{reference / arm['seconds']['median']:.3f}" for arm in timed],
    }
    lines = [f"{name:>{LEFT_WIDTH}}{row(texts, widths)}" for name, texts in cells.items()]
    return ["", f"the whole way, estimated from that, {rounds} times:", *lines]


def format_verdict(record: dict[str, Any]) -> list[str]:
    """A line about auto, if it was timed."""
    if record["auto_of_best"] is None:
        return []
    verdict = "kept" if record["auto_holds"] else "not kept"
    return [
        f"{AUTO} is {record['auto_of_best']:.3f} times as fast as the best fixed arm, "
        f"{record['best_fixed']}; at most {TOLERANCE:.0%} slower: {verdict}"
    ]
