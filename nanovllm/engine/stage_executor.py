"""How the stages of a pipelined step reach the device: on one stream, or on one stream per stage.

The scheduler speaks to an executor in three words: `run` a piece of work on a lane, `record` an
event behind it, and let a lane `wait` for an event. What a lane is differs: with `InlineExecutor`
all lanes are the current stream, with `StreamExecutor` each stage has its own, possibly on its own
SM partition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from nanovllm.engine.stage_marks import StageMarks
from nanovllm.kernels.library_sms import limited_to


class Lane(Enum):
    """Where work is issued: the stream of the caller, or that of a stage."""

    MAIN = "main"
    ATTENTION = "attention"
    FFN = "ffn"


@dataclass(frozen=True)
class Work:
    """What a piece of work is, for timelines: a stage of one layer and micro-batch."""

    lane: Lane
    layer: int
    micro_batch: int


class StageExecutor(ABC):
    """Issues work in order on each lane; lanes are ordered among each other by events alone."""

    @abstractmethod
    def run(self, work: Work, function: Callable[[], None], marks: StageMarks | None) -> None:
        """Issues `function` on the lane of `work`, between two time marks if there are `marks`."""

    @abstractmethod
    def record(self, lane: Lane) -> Any:
        """Returns an event that is complete when everything issued on `lane` so far is."""

    @abstractmethod
    def wait(self, lane: Lane, event: Any) -> None:
        """Lets what is issued on `lane` from now on wait for `event`."""


class InlineExecutor(StageExecutor):
    """All lanes are the current stream, or the CPU itself, so there is nothing to wait for."""

    def run(self, work: Work, function: Callable[[], None], marks: StageMarks | None) -> None:
        run_marked(work, function, marks)

    def record(self, lane: Lane) -> None:
        return None

    def wait(self, lane: Lane, event: None) -> None:
        return None


class StreamExecutor(StageExecutor):
    """The stages have a stream each; the main lane is the stream that is current at the call.

    NOTE: what a stage allocates belongs to its stream. torch's allocator hands freed memory to the
    next allocation on the same stream at once, so a tensor that another lane reads must be held
    until its own lane has waited for that reader. `PipelineScheduler` says how it does that.
    """

    def __init__(
        self,
        attention: torch.cuda.Stream,
        ffn: torch.cuda.Stream,
        ffn_sms: int | None = None,
        device_sms: int = 0,
    ) -> None:
        """Streams of the stages; with partitions also the FFN's SMs, and the device's."""
        self.streams = {Lane.ATTENTION: attention, Lane.FFN: ffn}
        self.ffn_sms = ffn_sms
        self.device_sms = device_sms

    def run(self, work: Work, function: Callable[[], None], marks: StageMarks | None) -> None:
        with torch.cuda.stream(self._stream(work.lane)), self._partition(work.lane):
            run_marked(work, function, marks)

    def record(self, lane: Lane) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._stream(lane))
        return event

    def wait(self, lane: Lane, event: torch.cuda.Event) -> None:
        self._stream(lane).wait_event(event)

    def _partition(self, lane: Lane) -> AbstractContextManager[None]:
        if lane is Lane.FFN and self.ffn_sms is not None:
            return limited_to(self.ffn_sms, self.device_sms)
        return nullcontext()

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return self.streams.get(lane) or torch.cuda.current_stream()


def run_marked(work: Work, function: Callable[[], None], marks: StageMarks | None) -> None:
    """Runs `function`, between two marks if there are any."""
    if marks is None:
        function()
        return
    with marks.around(work.lane.value, work.layer, work.micro_batch):
        function()
