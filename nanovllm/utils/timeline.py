"""Decode steps as a timeline: a Chrome/Perfetto trace, or a picture.

One row for each lane, one box for each work: neighbouring stages of a micro-batch. A trace opens in
https://ui.perfetto.dev or chrome://tracing; its format is
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.engine.stage_times import Span

# Space between two steps; they are measured each from its own beginning.
GAP_MS = 0.05
# A picture shows this much of the last step: enough layers to see the pattern, few enough to read.
DRAWN_LAYERS = 6
COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")


def save_timeline(steps: list[list[Span]], path: str) -> None:
    """Writes `steps`, the spans of each, as a picture if `path` ends in .png, else as a trace.

    Raises:
        ValueError: there are no steps.
        ImportError: a picture is wanted, and matplotlib is not installed.
    """
    if not steps:
        raise ValueError(
            "there is no profiled decode step to draw: set pipeline_enable_profiling=True and "
            "generate something first"
        )
    if path.endswith(".png"):
        pipelined = [spans for spans in steps if any(span.micro_batch for span in spans)]
        draw((pipelined or steps)[-1], path)
    else:
        Path(path).write_text(json.dumps({"traceEvents": trace_events(steps)}), encoding="utf-8")


def lanes_of(spans: Iterable[Span]) -> list[str]:
    """Names of lanes, attention first, then in the order in which they begin."""
    return sorted(dict.fromkeys(span.lane for span in spans), key=lambda lane: lane != "attention")


def trace_events(steps: list[list[Span]]) -> list[dict[str, Any]]:
    """The steps one after the other as events of a Chrome trace; its times are in microseconds."""
    rows = lanes_of(chain.from_iterable(steps))
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": lane}}
        for row, lane in enumerate(rows)
    ]
    origin_ms = 0.0
    for number, spans in enumerate(steps):
        for span in spans:
            stages = [f"{stage}{layer}" for stage, layer in span.stages]
            events.append({
                "ph": "X",
                "name": f"{letter(span)} {' '.join(stages)}",
                "cat": span.lane,
                "pid": 0,
                "tid": rows.index(span.lane),
                "ts": (origin_ms + span.start_ms) * 1e3,
                "dur": (span.end_ms - span.start_ms) * 1e3,
                "args": {"step": number, "stages": stages, "micro_batch": span.micro_batch},
            })  # fmt: skip
        origin_ms += max(span.end_ms for span in spans) + GAP_MS
    return events


def letter(span: Span) -> str:
    """A for micro-batch 0, and so on."""
    return chr(ord("A") + span.micro_batch)


def label(span: Span) -> str:
    """Micro-batch and first layer, such as "A3", or "A in" before all layers; then the stages."""
    names, first = " ".join(stage for stage, _ in span.stages), span.stages[0][1]
    return f"{letter(span)}{first if first >= 0 else ' in'}\n{names}"


def draw(spans: list[Span], path: str) -> None:
    """Draws the first layers of one step."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from error
    rows = lanes_of(spans)[::-1]
    figure = Figure(figsize=(13, 1.2 + 0.7 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for span in spans:
        if span.stages[0][1] < DRAWN_LAYERS:
            row, width = rows.index(span.lane), span.end_ms - span.start_ms
            color = COLORS[span.micro_batch % len(COLORS)]
            bars = axes.barh(row, width, 0.8, span.start_ms, color=color, edgecolor="white")
            axes.bar_label(bars, [label(span)], label_type="center", fontsize=6, color="white")
    axes.set_yticks(range(len(rows)), [lane if lane != "ffn" else "FFN" for lane in rows])
    axes.set_xlabel("ms from the beginning of the step")
    axes.set_title(
        f"One decode step, first {DRAWN_LAYERS} layers: a color for each micro-batch", fontsize=10
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=150)
