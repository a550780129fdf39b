"""Ends what a GPU waits for in vain, when a rank is dead or silent or the ranks part."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from time import monotonic

import torch

from nanovllm.engine.parallel.processes import POLL_SECONDS, RankDiedError, Workers


def silence(step_timeout: float) -> RankDiedError:
    """What to raise if a step made no progress for so many seconds."""
    return RankDiedError(
        f"a rank is silent: a step made no progress for step_timeout={step_timeout:g} s"
    )


class Guard:
    """A thread of a rank that watches the others; the only place that ends a wait on the GPU.

    The main thread cannot: it may be inside a CUDA call that waits for a collective without a peer.
    `end_waits` is called once, when a worker is dead or the ranks part; also when they part in
    order, as NCCL lets none leave before all do, and rank 0 leaves when the workers have.
    """

    def __init__(
        self,
        rank: int,  # this one
        workers: Workers,  # whose death ends the waits
        device: torch.device,
        step_timeout: float,  # seconds after which a worker ends if what it issued has not
        end_waits: Callable[[], None],
    ) -> None:
        self.rank, self.workers, self.end_waits = rank, workers, end_waits
        self.device, self.step_timeout = device, step_timeout
        self._parting = threading.Event()
        # Of a worker: an event behind all work, and when it was issued.
        self._issued: tuple[torch.cuda.Event, float] | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def watch_step(self) -> None:
        """Lets this worker end if what was issued so far does not, within `step_timeout`."""
        event = torch.cuda.Event()
        event.record()
        self._issued = event, monotonic()

    def part(self) -> None:
        """Ends all waits: the ranks part."""
        self._parting.set()

    def join(self, seconds: float) -> None:
        """Waits until the thread has ended the waits."""
        self._thread.join(seconds)

    def _watch(self) -> None:
        while not self._parting.wait(POLL_SECONDS) and self.workers.dead_worker() is None:
            if self._is_stuck():
                print(f"rank {self.rank}:", silence(self.step_timeout), file=sys.stderr, flush=True)
                os._exit(1)
        self.end_waits()

    def _is_stuck(self) -> bool:
        if self._issued is None:
            return False
        event, since = self._issued
        if monotonic() - since <= self.step_timeout:
            return False
        with torch.cuda.device(self.device):  # or the query would make a context on another
            return not event.query()
