"""The curves as a picture: two panels, bandwidth and GEMM rate, each against SMs.

Dashed lines are what the whole device reaches. It is made to be read at the width of a README.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanovllm.bench import BenchError

SIZE = (9.5, 4.0)  # inches
# Curves by their names in the record; those of the right panel get darker with the tokens.
ATTENTION, READ = "#4c72b0", "#9aa5b5"
GEMM = ("#f0b48c", "#dd8452", "#9c4a1c")
CEILING = "#444444"


def draw_curves(record: dict[str, Any], path: Path) -> None:
    """Draws the record of `measure_curves`.

    Raises:
        BenchError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BenchError("a picture needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_bandwidth(left, record)
    draw_gemm(right, record)
    figure.suptitle(curves_title(record), fontsize=10.5)
    figure.savefig(path, dpi=150)


def curves_title(record: dict[str, Any]) -> str:
    """What, device, versions and date."""
    versions = {name: record["versions"].get(name) for name in ("driver", "torch", "triton")}
    known = [f"{name} {value}" for name, value in versions.items() if value is not None]
    where = ", ".join([record["device"]["name"], *known, record["date"][:10]])
    return f"What SMs are worth to each stage: Qwen3 {record['shape']} layers in bfloat16\n{where}"


def draw_bandwidth(axes: Any, record: dict[str, Any]) -> None:
    """The left panel, in TB/s."""
    points, copy = record["bandwidth"], record["copy_bandwidth"] / 1e12
    sms = [point["sms"] for point in points]
    for name, color, text in (("read", READ, "plain read"), ("attention", ATTENTION, "attention")):
        rates = [point[name] / 1e12 for point in points]
        axes.plot(sms, rates, color=color, marker="o", markersize=4, label=text)
    draw_ceiling(axes, copy, f"copy on all SMs: {copy:.2f} TB/s")
    title = f"decode attention: {record['sequences']} sequences of {record['context']} tokens"
    finish(axes, title, "TB/s", sms)


def draw_gemm(axes: Any, record: dict[str, Any]) -> None:
    """The right panel, in TFLOP/s."""
    points, peak = record["gemm"], record["matmul_peak"] / 1e12
    sms = [point["sms"] for point in points]
    names = [name for name in points[0] if name != "sms"]
    for name, color in zip(names, GEMM, strict=True):
        rates = [point[name] / 1e12 for point in points]
        axes.plot(sms, rates, color=color, marker="o", markersize=4, label=f"{name} tokens")
    draw_ceiling(axes, peak, f"large product on all SMs: {peak:.0f} TFLOP/s")
    finish(axes, f"dense products of a layer: {library_of(record)}", "TFLOP/s", sms)


def library_of(record: dict[str, Any]) -> str:
    """What multiplied on the partitions; records from before it was told the SMs do not say."""
    return record.get("dense_library", "cuBLAS")


def draw_ceiling(axes: Any, value: float, text: str) -> None:
    axes.axhline(value, color=CEILING, linestyle="--", linewidth=1)
    axes.annotate(
        text, (0, value), xycoords=("axes fraction", "data"), fontsize=8.5, color=CEILING,
        xytext=(5, 4), textcoords="offset points",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def finish(axes: Any, title: str, unit: str, sms: list[int]) -> None:
    """Titles, legend and scales, both from 0."""
    axes.set_title(title, fontsize=9.5)
    axes.set_xlabel("SMs of the partition; the last point is the whole device", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.set_xlim(0, sms[-1] * 1.04)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.06)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8.5, loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
