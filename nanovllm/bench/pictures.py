"""Maps and curves as pictures, made to be read at the width of a README: 9 inches, 900 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.bench.gains import axes, short_label
from nanovllm.bench.report import Record

DPI = 150
# Inches. A cell of the map holds a number, and below it the name of an arm.
CELL_WIDTH, CELL_HEIGHT, PANEL_MARGIN = 0.47, 0.38, 0.5
COLUMNS, NARROWEST = 3, 7.5
# Gains this far from 1 have the full colour; below this brightness of a cell, text is white.
FULL_COLOR, DARK = 0.25, 0.55
PANELS = {"best_gain": "best fixed split", "auto_gain": "auto"}
SHORT = {"microbatch": "2 parts", "fallback": "fallb."}
LEGEND = "tokens of context\nsmall: SMs of attention + FFN   hatched: does not fit   -: not timed"
# Curves by their names in the record; those of the right panel get darker with the tokens.
CURVE_SIZE = (9.0, 4.0)
ATTENTION, READ, GEMM = "#4c72b0", "#9aa5b5", ("#f0b48c", "#dd8452", "#9c4a1c")


def draw_map(record: Record, path: Path) -> None:
    """A panel a shape for the gain of the best fixed arm, then, if it was timed, for auto's.

    In each panel, contexts go to the right and batches up. Blue gains, red loses.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    shapes = record["shapes"]
    fields = [field for field in PANELS if was_timed(shapes, field)] or list(PANELS)[:1]
    columns = min(COLUMNS, len(shapes))
    lines = -(-len(shapes) // columns)
    rows, cells = zip(*(map(len, axes(shape)) for shape in shapes), strict=True)
    width = columns * (max(cells) * CELL_WIDTH + PANEL_MARGIN) + 1
    height = len(fields) * lines * (max(rows) * CELL_HEIGHT + PANEL_MARGIN) + 1
    figure = Figure(figsize=(max(width, NARROWEST), height), layout="constrained")
    panels = figure.subplots(len(fields) * lines, columns, squeeze=False)
    colors = ScalarMappable(Normalize(1 - FULL_COLOR, 1 + FULL_COLOR), "RdBu")
    for panel in panels.flat:
        panel.set_visible(False)
    for i, field in enumerate(fields):
        of_field = panels[i * lines : (i + 1) * lines].flat
        for panel, shape in zip(of_field, shapes, strict=False):
            panel.set_visible(True)
            draw_panel(panel, shape, field, colors)
            panel.set_title(f"{shape['name']}: {PANELS[field]}", fontsize=10)
        for row in panels[i * lines : (i + 1) * lines]:
            row[0].set_ylabel("sequences", fontsize=9)
    figure.supxlabel(LEGEND, fontsize=9)
    shrink = min(1.0, 4 / height)
    bar = figure.colorbar(colors, ax=panels, extend="both", shrink=shrink, aspect=20, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    names = " ".join(shape["name"] for shape in shapes)
    what = f"Pipelined decode, speed over sequential: {names}"
    figure.suptitle(heading(record, what), fontsize=10.5)
    figure.savefig(path, dpi=DPI)


def heading(record: Record, what: str) -> str:
    """What, and below it device, SMs, versions and date."""
    device, versions = record["device"], record["versions"]
    sms = f" ({device['sms']} SMs)" if device["sms"] else ""
    known = [
        f"{name} {versions[name]}" for name in ("driver", "torch", "triton") if versions.get(name)
    ]
    return f"{what}\n" + ", ".join([device["name"] + sms, *known, record["date"][:10]])


def was_timed(shapes: Sequence[Record], field: str) -> bool:
    """Whether any point of any shape has that gain."""
    return any(point[field] is not None for shape in shapes for point in shape["points"])


def draw_panel(panel: Any, shape: Record, field: str, colors: Any) -> None:
    """One quantity of one shape on matplotlib axes."""
    batches, contexts = axes(shape)
    for point in shape["points"]:
        x, y = contexts.index(point["context"]), batches.index(point["batch"])
        draw_cell(panel, x, y, point, field, colors)
    panel.set_xlim(-0.5, len(contexts) - 0.5)
    panel.set_ylim(-0.5, len(batches) - 0.5)
    panel.set_xticks(range(len(contexts)), contexts, fontsize=8)
    panel.set_yticks(range(len(batches)), batches, fontsize=8)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def draw_cell(panel: Any, x: int, y: int, point: Record, field: str, colors: Any) -> None:
    """A point: its number on its colour; hatched if it does not fit, "-" if no arm runs there."""
    from matplotlib.patches import Rectangle

    gain = point[field]
    corner = (x - 0.5, y - 0.5)
    if point["reason"] is not None:
        panel.add_patch(Rectangle(corner, 1, 1, fc="#e4e4e4", ec="#bdbdbd", hatch="////"))
        return
    red, green, blue, _ = color = (0.94,) * 3 + (1.0,) if gain is None else colors.to_rgba(gain)
    panel.add_patch(Rectangle(corner, 1, 1, fc=color, ec="white"))
    named = field == "best_gain" and point["best"] is not None
    brightness = 0.3 * red + 0.59 * green + 0.11 * blue  # as eyes weigh it
    how = {"ha": "center", "va": "center", "color": "white" if brightness < DARK else "black"}
    text = "-" if gain is None else f"{gain:.2f}"
    panel.text(x, y + 0.17 * named, text, fontsize=9, **how)
    if named:
        label = SHORT.get(point["best"], short_label(point["best"]))
        panel.text(x, y - 0.26, label, fontsize=7, **how)


def draw_curves(record: Record, path: Path) -> None:
    """Two panels, bandwidth and GEMM rate, each against SMs; dashed: what the whole device does."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=CURVE_SIZE, layout="constrained")
    left, right = figure.subplots(1, 2)
    copy, peak = record["copy_bandwidth"] / 1e12, record["matmul_peak"] / 1e12
    names = {"attention": ("attention", ATTENTION), "read": ("plain read", READ)}
    draw_lines(left, record["bandwidth"], names, copy, f"copy on all SMs: {copy:.2f} TB/s")
    left.set_title(
        f"decode attention, {record['sequences']} sequences of {record['context']} tokens",
        fontsize=10,
    )
    left.set_ylabel("TB/s", fontsize=9)
    tokens = [name for name in record["gemm"][0] if name != "sms"]
    names = {n: (f"{n} tokens", color) for n, color in zip(tokens, GEMM, strict=True)}
    draw_lines(right, record["gemm"], names, peak, f"large product on all SMs: {peak:.0f} TFLOP/s")
    library = record.get("dense_library", "cuBLAS")
    right.set_title(f"dense products of a layer, {library}", fontsize=10)
    right.set_ylabel("TFLOP/s", fontsize=9)
    what = f"What SMs are worth to each stage: layers of {record['shape']} in bfloat16"
    figure.suptitle(heading(record, what), fontsize=11)
    figure.savefig(path, dpi=DPI)


def draw_lines(
    panel: Any, points: Sequence[Record], names: dict[str, Any], ceiling: float, text: str
) -> None:
    """Rates in units of 1e12 by SMs, and the ceiling; both scales from 0."""
    sms = [point["sms"] for point in points]
    for name, (label, color) in names.items():
        rates = [point[name] / 1e12 for point in points]
        panel.plot(sms, rates, color=color, marker="o", markersize=4, label=label)
    panel.axhline(ceiling, color="#444444", linestyle="--", linewidth=1, label=text)
    panel.set_xlabel("SMs of the partition; the last point is the whole device", fontsize=9)
    panel.tick_params(labelsize=9)
    panel.set_xlim(0, sms[-1] * 1.04)
    panel.set_ylim(0, panel.get_ylim()[1] * 1.06)
    panel.grid(color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.legend(fontsize=8.5, loc="lower right", frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
