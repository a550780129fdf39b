"""What a map says: how much each arm gains over sequential decode, and where.

A gain is speed: sequential step time over the arm's, so above 1 is faster. These functions know
nothing of engines; they read and write the plain values that a map's JSON file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.bench import report
from nanovllm.bench.arms import AUTO, GREEN, SEQUENTIAL
from nanovllm.bench.report import Record

# "auto" keeps its promise where it is no slower than sequential, and near the best of all arms.
LEAST_AUTO_GAIN = 0.99
AUTO_TOLERANCE = 0.02
# Points are worth naming from this gain on.
LEAST_GAIN = 1.05


def judge(step_ms: Mapping[str, float]) -> Record:
    """The fields of a point that follow from its arms' median step times, by label.

    "best" is the fastest arm that is neither sequential nor auto, "auto_of_best" auto's speed over
    the fastest arm of all, and "auto_holds" whether auto keeps its promise. Of an arm that there is
    not, the fields are None.
    """
    reference = step_ms[SEQUENTIAL]
    gains = {label: reference / time for label, time in step_ms.items() if label != SEQUENTIAL}
    best = max((label for label in gains if label != AUTO), key=lambda x: gains[x], default=None)
    verdict: Record = {
        "gains": gains,
        "best": best,
        "best_gain": None if best is None else gains[best],
        **dict.fromkeys(("auto_gain", "auto_of_best", "auto_holds")),
    }
    if AUTO in gains:
        of_best = min(step_ms.values()) / step_ms[AUTO]
        holds = gains[AUTO] >= LEAST_AUTO_GAIN and of_best >= 1 / (1 + AUTO_TOLERANCE)
        verdict |= {"auto_gain": gains[AUTO], "auto_of_best": of_best, "auto_holds": holds}
    return verdict


def summarize(shapes: list[Record]) -> Record:
    """Counts, extremes and gains of all shapes of a map; None for what was not measured."""
    points = [{"shape": shape["name"], **point} for shape in shapes for point in shape["points"]]
    measured = [point for point in points if point["reason"] is None]
    with_auto = [point for point in measured if point["auto_gain"] is not None]
    with_best = [point for point in measured if point["best_gain"] is not None]
    worst = min(with_auto, key=lambda point: point["auto_gain"], default=None)
    best = max(with_best, key=lambda point: point["best_gain"], default=None)

    def place(point: Record | None, *fields: str) -> Record | None:
        return point and {name: point[name] for name in ("shape", "batch", "context", *fields)}

    return {
        "points": len(measured),
        "not_measured": len(points) - len(measured),
        "worst_auto": place(worst, "auto_gain"),
        "auto_points": len(with_auto),
        "auto_fails": [
            place(point, "auto_gain", "auto_of_best")
            for point in with_auto
            if not point["auto_holds"]
        ],
        "best": place(best, "best_gain", "best"),
        "gaining": [
            place(point, "best_gain", "best")
            for point in sorted(with_best, key=lambda point: -point["best_gain"])
            if point["best_gain"] >= LEAST_GAIN
        ],
    }


def axes(shape: Record) -> tuple[list[int], list[int]]:
    """The batches and the contexts of a shape's points, rising."""
    batches, contexts = (
        sorted({point[field] for point in shape["points"]}) for field in ("batch", "context")
    )
    return batches, contexts


def describe(record: Record) -> str:
    """The table of every shape, then the summary."""
    parts = ["\n".join(describe_shape(record, shape)) for shape in record["shapes"]]
    return "\n\n".join([*parts, "\n".join(describe_summary(record))])


def describe_shape(record: Record, shape: Record) -> list[str]:
    """The points of one shape, with the gain of each arm over sequential."""
    points = sorted(shape["points"], key=lambda point: (point["batch"], point["context"]))
    if not shape["arms"]:
        return [f"{shape['name']}: not measured, {points[0]['reason']}"]
    labels = [arm["label"] for arm in shape["arms"] if arm["label"] != SEQUENTIAL]
    granted = [
        f"{arm['label']} was granted {report.sms(arm)} SMs"
        for arm in shape["arms"]
        if "+" in arm["label"] and report.sms(arm) not in ("all", short_label(arm["label"]))
    ]
    head = ["batch", "context", "seq. ms", *map(short_label, labels), "auto's plan", "best"]
    rows = [head, *(point_cells(point, labels) for point in points)]
    if not any(point.get("plan") for point in points):
        rows = [row[:-2] + row[-1:] for row in rows]
    return [
        report.title({**record, **shape}),
        f"start-up {shape['startup_seconds']:.1f} s, {shape['kv_blocks']:,} KV blocks, "
        f"measured in {shape['seconds']:.0f} s; gains over sequential decode",
        *report.fallbacks(shape["arms"]),
        *granted,
        "",
        *report.table(rows),
    ]


def point_cells(point: Record, labels: list[str]) -> list[str]:
    """A row: "-" for an arm that cannot run there, "!" where auto fails."""
    start = [str(point["batch"]), str(point["context"])]
    if point["reason"] is not None:
        return [*start, "does not fit", *[""] * (len(labels) + 2)]
    gains = point["gains"]
    return [
        *start,
        f"{point['arms'][SEQUENTIAL]['step_ms']['median']:.3f}",
        *(f"{gains[label]:.3f}" if label in gains else "-" for label in labels),
        short_label(point.get("plan") or "-"),
        short_label(point["best"] or "-") + ("  ! auto" if point["auto_holds"] is False else ""),
    ]


def short_label(label: str) -> str:
    """A green arm by its split alone."""
    return label.removeprefix(f"{GREEN} ")


def describe_summary(record: Record) -> list[str]:
    """Number of points, the extremes, and the points that gain."""
    summary = record["summary"]
    lines = [
        f"{summary['points']} points in {record['sweep_seconds']:.0f} s, "
        f"{record['seconds_per_arm']:g} s of steps an arm"
        + (f"; {summary['not_measured']} more do not fit" if summary["not_measured"] else "")
    ]
    if best := summary["best"]:
        lines.append(f"best gain: {best['best_gain']:.3f} by {best['best']}, {where(best)}")
    if worst := summary["worst_auto"]:
        kept = summary["auto_points"] - len(summary["auto_fails"])
        lines.append(f"worst {AUTO}: {worst['auto_gain']:.3f}, {where(worst)}")
        lines.append(
            f"{AUTO} is at least {LEAST_AUTO_GAIN} and within {AUTO_TOLERANCE:.0%} of the best arm "
            f"at {kept} of {summary['auto_points']} points"
        )
        lines += [
            f"  not at {where(fail)}: {fail['auto_gain']:.3f}, {fail['auto_of_best']:.3f} of the "
            "best"
            for fail in summary["auto_fails"]
        ]
    gaining = [
        f"  {point['best_gain']:.3f} at {where(point)}, by {point['best']}"
        for point in summary["gaining"]
    ]
    return [*lines, f"points that gain {LEAST_GAIN} or more: {len(gaining)}", *gaining]


def where(place: Mapping[str, Any]) -> str:
    return f"{place['shape']} batch {place['batch']} context {place['context']}"
