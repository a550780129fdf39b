"""Maps as pictures, made to be read at the width of a README: 9 inches, 900 pixels."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from nanovllm.bench.gains import Point, axes, judge, short_label
from nanovllm.bench.report import Record

DPI = 150
# Inches. A cell of the map holds a number, and below it the name of an arm.
CELL_WIDTH, CELL_HEIGHT, PANEL_MARGIN = 0.47, 0.38, 0.5
COLUMNS, NARROWEST = 3, 7.5
# Gains this far from 1 have the full colour, and from there on text is white.
FULL_COLOR, DARK = 0.25, 0.16
PANELS = {"best_gain": "best fixed split", "auto_gain": "auto"}
SHORT = {"microbatch": "2 parts", "fallback": "fallb."}
LEGEND = "below: SMs of attention + FFN; hatched: does not fit; -: not timed"


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
    names = [*shapes, *[None] * (lines * columns - len(shapes))]  # each field fills its lines
    for panel, (field, name) in zip(panels.flat, product(fields, names), strict=True):
        if name is None:
            panel.set_visible(False)
        else:
            draw_panel(panel, shapes[name], field, colors)
            panel.set_title(f"{name}: {PANELS[field]}", fontsize=10)
    figure.supylabel("sequences", fontsize=9)
    figure.supxlabel(f"tokens of context\n{LEGEND}", fontsize=9)
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
    """One quantity of one shape on matplotlib axes; a point is its number on its colour."""
    batches, contexts = axes(points)
    shades = np.ma.masked_all((len(batches), len(contexts)))
    for point in (point for point in points if point.reason is None):
        x, y = contexts.index(point.context), batches.index(point.batch)
        gain = getattr(point, field)
        shades[y, x] = shade = 1.0 if gain is None else gain
        how = {"ha": "center", "color": "white" if abs(shade - 1) > DARK else "black"}
        lines = ["-" if gain is None else f"{gain:.2f}"]
        if field == "best_gain" and point.best is not None:
            lines.append(SHORT.get(point.best, short_label(point.best)))
        panel.text(x + 0.5, y + 0.47, "\n".join(lines), fontsize=7.5, va="center", **how)
    panel.patch.set(facecolor="#e4e4e4", edgecolor="#bdbdbd", hatch="////")
    panel.pcolormesh(shades, cmap=colors.cmap, norm=colors.norm, edgecolors="white")
    panel.set_xticks(np.arange(len(contexts)) + 0.5, contexts, fontsize=8)
    panel.set_yticks(np.arange(len(batches)) + 0.5, batches, fontsize=8)
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
