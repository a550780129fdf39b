"""A map as a table: the gain of every arm at every point, and a summary."""

from __future__ import annotations

from typing import Any

from nanovllm.bench.arms import AUTO, GREEN, SEQUENTIAL
from nanovllm.bench.gains import AUTO_TOLERANCE, LEAST_AUTO_GAIN, REGION_GAIN
from nanovllm.bench.report import format_title

PLAN_TITLE, PLAN_WIDTH = "auto's plan", 13


def format_map(record: dict[str, Any]) -> str:
    """The table of every shape, then the summary."""
    parts = [format_shape(record, shape) for shape in record["shapes"]]
    return "\n\n".join([*parts, format_summary(record)])


def format_shape(record: dict[str, Any], shape: dict[str, Any]) -> str:
    """The points of one shape, with the gain of each arm over sequential."""
    points = sorted(shape["points"], key=lambda point: (point["batch"], point["context"]))
    if not shape["arms"]:
        return f"Qwen3 {shape['name']}: not measured, {points[0]['reason']}"
    labels = [arm["label"] for arm in shape["arms"] if arm["label"] != SEQUENTIAL]
    widths = {label: max(len(short_label(label)), 5) + 2 for label in labels}
    head = f"{'batch':>5}{'context':>9}{'seq. ms':>10}"
    head += "".join(f"{short_label(label):>{widths[label]}}" for label in labels)
    planned = any(map(auto_plan, points))
    head += f"{PLAN_TITLE:>{PLAN_WIDTH}}  best" if planned else "  best"
    lines = [
        format_title({**record, **shape}),
        f"start-up {shape['startup_seconds']:.1f} s, {shape['kv_blocks']:,} KV blocks, "
        f"measured in {shape['seconds']:.0f} s; gains over sequential decode",
        *(
            f"{arm['label']} is not timed, falls back: {arm['fallback_reason']}"
            for arm in shape["arms"]
            if arm["fallback_reason"] is not None
        ),
        *(format_granted(arm) for arm in shape["arms"] if granted_otherwise(arm)),
        "",
        head,
    ]
    return "\n".join([*lines, *(format_point(point, widths, planned) for point in points)])


def format_point(point: dict[str, Any], widths: dict[str, int], planned: bool) -> str:
    """A row of that table; "-" for an arm that cannot run there, "!" where auto fails.

    With `planned` it has the plan that auto chose.
    """
    start = f"{point['batch']:>5}{point['context']:>9}"
    if point["reason"] is not None:
        return f"{start}  does not fit"
    row = f"{start}{point['arms'][SEQUENTIAL]['step_ms']['median']:>10.3f}"
    for label, width in widths.items():
        gain = point["gains"].get(label)
        row += f"{'-':>{width}}" if gain is None else f"{gain:>{width}.3f}"
    if planned:
        row += f"{short_label(auto_plan(point) or '-'):>{PLAN_WIDTH}}"
    best = "-" if point["best"] is None else short_label(point["best"])
    return f"{row}  {best}{'  ! auto' if point['auto_holds'] is False else ''}"


def auto_plan(point: dict[str, Any]) -> str | None:
    """What a planner chose; None without one, as in all maps of before there was one."""
    return point.get("plan")


def short_label(label: str) -> str:
    """A green arm by its split alone."""
    return label.removeprefix(f"{GREEN} ")


def granted_otherwise(arm: dict[str, Any]) -> bool:
    """Whether a green arm runs on other SMs than its label says."""
    if arm["attention_sms"] is None or not arm["label"].startswith(f"{GREEN} "):
        return False
    return short_label(arm["label"]) != f"{arm['attention_sms']}+{arm['ffn_sms']}"


def format_granted(arm: dict[str, Any]) -> str:
    return f"{arm['label']} was granted {arm['attention_sms']}+{arm['ffn_sms']} SMs"


def format_summary(record: dict[str, Any]) -> str:
    """Number of points, the extremes, and the regions that gain."""
    summary = record["summary"]
    lines = [
        f"{summary['points']} points in {record['sweep_seconds']:.0f} s, "
        f"{record['seconds_per_arm']:g} s of steps an arm"
        + (f"; {summary['not_measured']} more do not fit" if summary["not_measured"] else "")
    ]
    if summary["best"] is not None:
        best = summary["best"]
        lines.append(f"best gain: {best['best_gain']:.3f} by {best['best']}, {format_place(best)}")
    if summary["worst_auto"] is not None:
        worst = summary["worst_auto"]
        lines.append(f"worst {AUTO}: {worst['auto_gain']:.3f}, {format_place(worst)}")
        kept = summary["auto_points"] - len(summary["auto_fails"])
        lines.append(
            f"{AUTO} is at least {LEAST_AUTO_GAIN} and within {AUTO_TOLERANCE:.0%} of the best arm "
            f"at {kept} of {summary['auto_points']} points"
        )
        lines += [
            f"  not at {format_place(fail)}: {fail['auto_gain']:.3f}, "
            f"{fail['auto_of_best']:.3f} of the best"
            for fail in summary["auto_fails"]
        ]
    lines += [format_region(region) for region in summary["regions"]]
    if not summary["regions"]:
        lines.append(f"no point gains {REGION_GAIN} or more")
    return "\n".join(lines)


def format_place(place: dict[str, Any]) -> str:
    return f"{place['shape']} batch {place['batch']} context {place['context']}"


def format_region(region: dict[str, Any]) -> str:
    """A region by its bounds; it need not fill them."""
    batches, contexts = ([cell[i] for cell in region["cells"]] for i in (0, 1))
    count = len(region["cells"])
    return (
        f"gain {REGION_GAIN} or more: {region['shape']}, batch {min(batches)} to {max(batches)}, "
        f"context {min(contexts)} to {max(contexts)}: {count} point{'s' * (count > 1)}, "
        f"{region['least_gain']:.3f} to {region['most_gain']:.3f}"
    )
