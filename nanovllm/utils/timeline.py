"""Decode steps as a timeline: a Chrome/Perfetto trace, or a picture.

One row per stage's stream, one box per stage, layer and micro-batch. A trace opens in
https://ui.perfetto.dev or chrome://tracing; its format is
https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.engine.stage_marks import Span

ROWS = ("attention", "ffn")
# Space between two steps; they are measured each from its own beginning.
GAP_MS = 0.05
# A picture shows this much of the last step: enough layers to see the pattern, few enough to read.
DRAWN_LAYERS = 6
COLORS = {0: "#4c72b0", 1: "#dd8452"}


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
        # The last pipelined step, or the last one if none is.
        draw(next((step for step in reversed(steps) if is_pipelined(step)), steps[-1]), path)
    else:
        Path(path).write_text(json.dumps({"traceEvents": trace_events(steps)}), encoding="utf-8")


def trace_events(steps: list[list[Span]]) -> list[dict[str, object]]:
    """The steps one after the other as events of a Chrome trace; its times are in microseconds."""
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": row, "args": {"name": stage}}
        for row, stage in enumerate(ROWS)
    ]
    origin_ms = 0.0
    for number, spans in enumerate(steps):
        for span in spans:
            events.append(
                {
                    "ph": "X",
                    "name": label(span),
                    "cat": span.stage,
                    "pid": 0,
                    "tid": ROWS.index(span.stage),
                    "ts": (origin_ms + span.start_ms) * 1e3,
                    "dur": (span.end_ms - span.start_ms) * 1e3,
                    "args": {
                        "step": number,
                        "layer": span.layer,
                        "micro_batch": span.micro_batch,
                    },
                }
            )
        origin_ms += max(span.end_ms for span in spans) + GAP_MS
    return events


def is_pipelined(spans: list[Span]) -> bool:
    """Whether a step has more than one micro-batch."""
    return any(span.micro_batch for span in spans)


def label(span: Span) -> str:
    """Micro-batch and layer: "A3"; "A in" is what comes before layer 0."""
    name = "AB"[span.micro_batch]
    return f"{name} in" if span.layer < 0 else f"{name}{span.layer}"


def draw(spans: list[Span], path: str) -> None:
    """Draws the first layers of one step."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from error
    shown = [span for span in spans if span.layer < DRAWN_LAYERS]
    figure = Figure(figsize=(13, 2.6), layout="constrained")
    axes = figure.add_subplot()
    for span in shown:
        row = len(ROWS) - 1 - ROWS.index(span.stage)
        width = span.end_ms - span.start_ms
        color = COLORS[span.micro_batch]
        axes.barh(row, width, left=span.start_ms, height=0.8, color=color, edgecolor="white")
        axes.text(
            span.start_ms + width / 2, row, label(span), ha="center", va="center",
            fontsize=8, color="white", clip_on=True,
        )  # fmt: skip
    axes.set_yticks(range(len(ROWS)), [stage if stage != "ffn" else "FFN" for stage in ROWS[::-1]])
    axes.set_xlabel("ms from the beginning of the step")
    axes.set_title(
        f"One decode step, first {DRAWN_LAYERS} layers: micro-batches A (blue) and B (orange)",
        fontsize=10,
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150)
