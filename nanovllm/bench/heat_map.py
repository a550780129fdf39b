"""A map as a picture: rows of panels for the gain of the best arm and, if timed, that of auto.

One column a shape; in each panel, contexts go to the right and batches up. Blue gains, red loses.
It is made to be read at the width of a README.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.bench import BenchError
from nanovllm.bench.arms import GREEN
from nanovllm.bench.gains import axes

# Inches. A cell holds a number of four characters; margins hold axes, titles and the colour bar.
CELL_WIDTH, CELL_HEIGHT = 0.4, 0.36
PANEL_MARGIN, ROW_MARGIN = 0.35, 0.35
LEFT_RIGHT, TITLE_HEIGHT = 1.3, 1.2
NARROWEST = 6.5
# Gains this far from 1 have the full colour.
FULL_COLOR = 0.25
# Below this brightness of a cell, text is white.
DARK = 0.55
ROWS = {"best_gain": "best fixed arm", "auto_gain": "auto"}
SHORT = {"microbatch": "2 parts"}
LEGEND = "tokens of context\nsmall: SMs of attention + FFN;  hatched: does not fit;  -: not timed"


def draw_map(record: dict[str, Any], path: Path) -> None:
    """Draws a map's record.

    Raises:
        BenchError: matplotlib is not installed.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("a picture needs matplotlib: pip install matplotlib") from error
    shapes = record["shapes"]
    rows = {field: title for field, title in ROWS.items() if was_timed(shapes, field)} or ROWS
    sizes = [tuple(map(len, axes(shape))) for shape in shapes]
    width = LEFT_RIGHT + sum(n * CELL_WIDTH + PANEL_MARGIN for _, n in sizes)
    height = TITLE_HEIGHT + len(rows) * (max(n for n, _ in sizes) * CELL_HEIGHT + ROW_MARGIN)
    figure = Figure(figsize=(max(width, NARROWEST), height), layout="constrained")
    panels = figure.subplots(
        len(rows), len(shapes), squeeze=False, width_ratios=[n for _, n in sizes]
    )
    colors = ScalarMappable(Normalize(1 - FULL_COLOR, 1 + FULL_COLOR), "RdBu")
    for row, (field, title) in enumerate(rows.items()):
        for panel, shape in zip(panels[row], shapes, strict=True):
            draw_panel(panel, shape, field, colors)
            panel.set_title(f"{shape['name']}: {title}", fontsize=9)
            panel.set_ylabel("sequences" if shape is shapes[0] else "", fontsize=9)
            panel.tick_params(labelbottom=panel in panels[-1])
    figure.supxlabel(LEGEND, fontsize=8)
    bar = figure.colorbar(colors, ax=panels, extend="both", shrink=0.6, aspect=30, pad=0.01)
    bar.ax.tick_params(labelsize=8)
    figure.suptitle(map_title(record), fontsize=10)
    figure.savefig(path, dpi=150)


def was_timed(shapes: Sequence[dict[str, Any]], field: str) -> bool:
    """Whether any point of any shape has that gain."""
    return any(point[field] is not None for shape in shapes for point in shape["points"])


def map_title(record: dict[str, Any]) -> str:
    """Device, versions and date."""
    versions = {name: record["versions"].get(name) for name in ("driver", "torch", "triton")}
    known = [f"{name} {value}" for name, value in versions.items() if value is not None]
    where = ", ".join([record["device"]["name"], *known, record["date"][:10]])
    return f"Decode with the attention/FFN pipeline: speed over sequential\n{where}"


def draw_panel(panel: Any, shape: dict[str, Any], field: str, colors: Any) -> None:
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
    for spine in panel.spines.values():
        spine.set_visible(False)


def draw_cell(panel: Any, x: int, y: int, point: dict[str, Any], field: str, colors: Any) -> None:
    """A point: its number on its colour; hatched if it does not fit, "-" if no arm runs there."""
    from matplotlib.patches import Rectangle

    gain = point[field]
    corner = (x - 0.5, y - 0.5)
    if point["reason"] is not None:
        panel.add_patch(Rectangle(corner, 1, 1, fc="#e4e4e4", ec="#bdbdbd", hatch="////"))
        return
    color = (0.94, 0.94, 0.94, 1.0) if gain is None else colors.to_rgba(gain)
    panel.add_patch(Rectangle(corner, 1, 1, fc=color, ec="white"))
    named = field == "best_gain" and point["best"] is not None
    ink = "white" if brightness(color) < DARK else "black"
    text = "-" if gain is None else f"{gain:.2f}"
    place = {"ha": "center", "va": "center", "color": ink}
    panel.text(x, y + 0.15 * named, text, fontsize=9, **place)
    if named:
        panel.text(x, y - 0.27, cell_label(point["best"]), fontsize=6, **place)


def brightness(color: tuple[float, ...]) -> float:
    """Of an RGBA colour, as eyes weigh it; from 0 to 1."""
    red, green, blue = color[:3]
    return 0.3 * red + 0.59 * green + 0.11 * blue


def cell_label(label: str) -> str:
    """An arm's name, short enough for a cell."""
    return SHORT.get(label, label.removeprefix(f"{GREEN} "))
