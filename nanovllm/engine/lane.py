"""A lane: a stream that the works of a plan are issued on, perhaps on SMs of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nanovllm.kernels.gpu import cublas_sm_limit


@dataclass
class Lane:
    """Issues in order; lanes are ordered among each other by events alone.

    NOTE: torch's allocator hands memory that was freed to the next allocation on the same stream at
    once. engine/pipeline_scheduler.py says why no other lane still reads it.

    Without a stream work goes to the caller's, so there is nothing to wait for.
    """

    stream: torch.cuda.Stream | None = None
    sms: int = 0  # which matrix products are planned for, of `device_sms`
    device_sms: int = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """What is issued inside goes to this lane."""
        if self.stream is None:
            yield
            return
        with torch.cuda.stream(self.stream), cublas_sm_limit(self.sms, self.device_sms):
            yield

    def record(self) -> Any:
        """An event that is complete when everything issued on the lane so far is."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Lets what is issued on the lane from now on wait for `event`."""
        if self.stream is not None:
            self.stream.wait_event(event)
