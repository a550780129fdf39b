"""When each stage of a step began and ended, also inside a replayed CUDA graph.

A step that is profiled carries a `StageMarks`; every stage is put between two of its marks. On CUDA
a mark is a timing event. Captured into a graph, such an event is recorded anew by every replay, so
the marks of a graph are made once, at its capture, and read after each replay.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Span:
    """One stage of one layer and micro-batch; times in ms from the beginning of its step."""

    stage: str
    layer: int
    micro_batch: int
    start_ms: float
    end_ms: float


class StageMarks(ABC):
    """The marks of one step."""

    def __init__(self) -> None:
        self._origin: Any = None
        self._end: Any = None
        self._marks: list[tuple[str, int, int, Any, Any]] = []

    def begin_step(self) -> None:
        """Marks the beginning of the step on the current stream; forgets the step before."""
        self._marks = []
        self._origin = self._mark()

    def end_step(self) -> None:
        """Marks the end of the step on the current stream."""
        self._end = self._mark()

    @contextmanager
    def around(self, stage: str, layer: int, micro_batch: int) -> Iterator[None]:
        """Marks beginning and end of what is issued inside, on the stream that is current."""
        begin = self._mark()
        yield
        self._marks.append((stage, layer, micro_batch, begin, self._mark()))

    def read(self) -> tuple[list[Span], float]:
        """The stages of the last run, which must be complete, and the whole step in ms."""
        spans = [
            Span(
                stage,
                layer,
                micro_batch,
                self._elapsed_ms(self._origin, begin),
                self._elapsed_ms(self._origin, end),
            )
            for stage, layer, micro_batch, begin, end in self._marks
        ]
        return spans, self._elapsed_ms(self._origin, self._end)

    @abstractmethod
    def _mark(self) -> Any:
        """A point in time on the current stream."""

    @abstractmethod
    def _elapsed_ms(self, begin: Any, end: Any) -> float:
        """Time between two marks."""


class CpuMarks(StageMarks):
    """Marks by the clock, for work that is done when the call returns."""

    def _mark(self) -> float:
        return time.perf_counter()

    def _elapsed_ms(self, begin: float, end: float) -> float:
        return (end - begin) * 1e3


class CudaMarks(StageMarks):
    """Marks by timing events, recorded on the current stream; `in_graph` for a capture."""

    def __init__(self, in_graph: bool) -> None:
        super().__init__()
        self._in_graph = in_graph

    def _mark(self) -> torch.cuda.Event:
        # An external event becomes a node of the graph that records it, and can be read outside.
        event = torch.cuda.Event(enable_timing=True, external=self._in_graph)
        event.record()
        return event

    def _elapsed_ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end)


def make_marks(device: torch.device, in_graph: bool = False) -> StageMarks:
    """Marks for steps on `device`."""
    return CudaMarks(in_graph) if device.type == "cuda" else CpuMarks()
