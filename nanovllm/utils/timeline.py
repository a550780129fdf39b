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
# Of a step that is drawn to compare with: attention, and the rest.
PLAIN_COLORS = ("#555555", "#8c8c8c")
# A letter of a label is at most this share of the picture's width.
LETTER_SHARE = 0.007


def save_timeline(
    steps: list[list[Span]], path: str, title: str = "", ordinary: list[list[Span]] | None = None
) -> None:
    """Writes `steps`, the spans of each, as a picture if `path` ends in .png, else as a trace.

    A picture has the last step with several micro-batches, if one has, and beneath it the last of
    `ordinary`, steps of ordinary decode; `title` stands beside what it shows.

    Raises:
        ValueError: there are no steps.
        ImportError: a picture is wanted, and matplotlib is not installed.
    """
    if not steps:
        raise ValueError(
            "there is no profiled decode step to draw: pipeline_enable_profiling must be True, and "
            "a request must go on after its first token, which its prompt's step draws"
        )
    if path.endswith(".png"):
        pipelined = [spans for spans in steps if any(span.micro_batch for span in spans)]
        draw((pipelined or steps)[-1], path, title, ordinary[-1] if ordinary else [])
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


def draw(spans: list[Span], path: str, title: str, ordinary: list[Span]) -> None:
    """Draws the first layers of one step, a row for each lane, and of an ordinary one in a row."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install matplotlib") from error
    rows = lanes_of(spans)[::-1]  # the lowest first
    if ordinary:
        rows.insert(0, "ordinary")
    boxes = [(s.lane, s, COLORS[s.micro_batch % len(COLORS)], letter(s)) for s in spans]
    boxes += [("ordinary", s, PLAIN_COLORS[s.lane != "attention"], "") for s in ordinary]
    boxes = [box for box in boxes if box[1].stages[0][1] < DRAWN_LAYERS]
    last_ms = max(span.end_ms for _, span, _, _ in boxes)
    figure = Figure(figsize=(9, 0.9 + 0.6 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for row, span, color, prefix in boxes:
        place, width = rows.index(row), span.end_ms - span.start_ms
        bars = axes.barh(place, width, 0.85, span.start_ms, color=color, edgecolor="white")
        longest = width / last_ms / LETTER_SHARE
        layer = span.stages[0][1]
        name = f"{prefix}{layer if layer >= 0 else ' in'}"  # A3, or "A in" before the first layer
        lines = name, " ".join(stage for stage, _ in span.stages)
        fitting = "\n".join(line for line in lines if len(line) <= longest)
        axes.bar_label(bars, [fitting], label_type="center", fontsize=6.5, color="white")
    axes.set_yticks(range(len(rows)), [row if row != "ffn" else "FFN" for row in rows])
    axes.set_xlim(0, last_ms)
    axes.set_xlabel("ms from the beginning of the step")
    shown = f"First {DRAWN_LAYERS} layers of a decode step"
    axes.set_title(f"{title}: {shown.lower()}" if title else shown, fontsize=8.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path, dpi=200)
