"""When each work of a step began and ended, also inside a replayed CUDA graph.

On CUDA a moment is a timing event. Captured into a graph, such an event is recorded anew by every
replay, so the timer of a graph is made once, at its capture, and read after each replay.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.engine.plan import Work


@dataclass(frozen=True)
class Span:
    """One work of a step, its times in ms from the beginning of the step."""

    lane: str
    micro_batch: int
    stages: tuple[tuple[str, int], ...]  # name and layer of each, in order
    start_ms: float
    end_ms: float


class ClockEvent:
    """As a timing event of CUDA, for work that is done when the call returns."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: ClockEvent) -> float:
        return (end.seconds - self.seconds) * 1e3


class StageTimer:
    """The moments of one step on `device`; `in_graph` for a capture."""

    def __init__(self, device: torch.device, *, in_graph: bool = False) -> None:
        self.is_cuda = device.type == "cuda"
        self.in_graph = in_graph
        self.works: list[tuple[Work, Any, Any]] = []

    def mark(self) -> Any:
        """This moment on the current stream.

        NOTE: a graph that records an external event which is gone crashes the process.
        """
        event: Any = ClockEvent()
        if self.is_cuda:
            # An external event becomes a node of the graph that records it, readable outside.
            event = torch.cuda.Event(enable_timing=True, external=self.in_graph)
        event.record()
        return event

    def begin_step(self) -> None:
        """A step begins here on the current stream; forgets the one before."""
        self.works, self.begin = [], self.mark()

    def end_step(self) -> None:
        """The step ends here on the current stream."""
        self.end = self.mark()

    def add(self, work: Work, begin: Any) -> None:
        """A work that began at `begin` ends here on the current stream."""
        self.works.append((work, begin, self.mark()))

    def read(self) -> tuple[list[Span], float]:
        """The works of the last run, which must be complete, and the whole step in ms."""
        elapsed = self.begin.elapsed_time
        spans = []
        for work, begin, end in self.works:
            stages = tuple((stage.name, stage.layer) for stage in work.stages)
            spans.append(Span(work.lane, work.micro_batch, stages, elapsed(begin), elapsed(end)))
        return spans, elapsed(self.end)
