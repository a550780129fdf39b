"""Maps as pictures, made to be read at the width of a README: 9 inches, 900 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.bench.gains import Point, axes, judge, short_label
from nanovllm.bench.report import Record

DPI = 150
# Inches. A cell of the map holds a number, and below it the name of an arm.
CELL_WIDTH, CELL_HEIGHT, PANEL_MARGIN = 0.47, 0.38, 0.5
COLUMNS, NARROWEST = 3, 7.5
# Gains this far from 1 have the full colour; below this brightness of a cell, text is white.
FULL_COLOR, DARK = 0.25, 0.55
PANELS = {"best_gain": "best fixed split", "auto_gain": "auto"}
SHORT = {"microbatch": "2 parts", "fallback": "fallb."}
LEGEND = "small: SMs of attention + FFN; hatched: does not fit; -: not timed"


def draw_map(record: Record, path: Path) -> None:
    """A panel a shape for the gain of the best fixed arm, then, if it was timed, for auto's.

    In each panel, contexts go to the right and batches up. Blue gains, red loses.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    shapes = {shape["name"]: judge(shape) for shape in record["shapes"]}
    points = [point for of_shape in shapes.values() for point in of_shape]
    fields = [field for field in PANELS if any(getattr(p, field) is not None for p in points)]
    fields = fields or [*PANELS][:1]
    columns = min(COLUMNS, len(shapes))
    lines = -(-len(shapes) // columns)
    rows, cells = zip(*(map(len, axes(points)) for points in shapes.values()), strict=True)
    width = columns * (max(cells) * CELL_WIDTH + PANEL_MARGIN) + 1
    height = len(fields) * lines * (max(rows) * CELL_HEIGHT + PANEL_MARGIN) + 1
    figure = Figure(figsize=(max(width, NARROWEST), height), layout="constrained")
    panels = figure.subplots(len(fields) * lines, columns, squeeze=False)
    colors = ScalarMappable(Normalize(1 - FULL_COLOR, 1 + FULL_COLOR), "RdBu")
    for panel in panels.flat:
        panel.set_visible(False)
    for i, field in enumerate(fields):
        of_field = panels[i * lines : (i + 1) * lines].flat
        for panel, (name, of_shape) in zip(of_field, shapes.items(), strict=False):
            panel.set_visible(True)
            draw_panel(panel, of_shape, field, colors)
            panel.set_title(f"{name}: {PANELS[field]}", fontsize=10)
        for row in panels[i * lines : (i + 1) * lines]:
            row[0].set_ylabel("sequences", fontsize=9)
            row[0].set_xlabel("tokens of context", fontsize=9)
    figure.supxlabel(LEGEND, fontsize=9)
    shrink = min(1.0, 4 / height)
    bar = figure.colorbar(colors, ax=panels, extend="both", shrink=shrink, aspect=20, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("speed over sequential", fontsize=9)
    what = f"Pipelined decode, speed over sequential: {', '.join(shapes)}"
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


def draw_panel(panel: Any, points: list[Point], field: str, colors: Any) -> None:
    """One quantity of one shape on matplotlib axes."""
    batches, contexts = axes(points)
    for point in points:
        x, y = contexts.index(point.context), batches.index(point.batch)
        draw_cell(panel, x, y, point, field, colors)
    panel.set_xlim(-0.5, len(contexts) - 0.5)
    panel.set_ylim(-0.5, len(batches) - 0.5)
    panel.set_xticks(range(len(contexts)), contexts, fontsize=8)
    panel.set_yticks(range(len(batches)), batches, fontsize=8)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def draw_cell(panel: Any, x: int, y: int, point: Point, field: str, colors: Any) -> None:
    """A point: its number on its colour; hatched if it does not fit, "-" if no arm runs there."""
    from matplotlib.patches import Rectangle

    gain = getattr(point, field)
    corner = (x - 0.5, y - 0.5)
    if point.reason is not None:
        panel.add_patch(Rectangle(corner, 1, 1, fc="#e4e4e4", ec="#bdbdbd", hatch="////"))
        return
    red, green, blue, _ = color = (0.94,) * 3 + (1.0,) if gain is None else colors.to_rgba(gain)
    panel.add_patch(Rectangle(corner, 1, 1, fc=color, ec="white"))
    label = point.best if field == "best_gain" else None
    brightness = 0.3 * red + 0.59 * green + 0.11 * blue  # as eyes weigh it
    how = {"ha": "center", "va": "center", "color": "white" if brightness < DARK else "black"}
    text = "-" if gain is None else f"{gain:.2f}"
    panel.text(x, y if label is None else y + 0.17, text, fontsize=9, **how)
    if label is not None:
        panel.text(x, y - 0.26, SHORT.get(label, short_label(label)), fontsize=7, **how)
