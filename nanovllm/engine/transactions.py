"""What an engine's calls are wrapped in: one thread at a time, and a broken-off change is noticed.

An exception or an interrupt can come at any line. So a change counts as unfinished until its end,
and whoever comes next and finds one unfinished has to mend the state first. The lock is held a step
at a time, so that several threads share one batch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from nanovllm.utils.locks import exclusive

P = ParamSpec("P")
T = TypeVar("T")

# How long the end of the interpreter waits for a step that another thread runs.
EXIT_SECONDS = 10.0


class Transactions:
    """The lock of an engine, and what it says of the state."""

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self.lock = threading.RLock()
        self.callers: set[object] = set()  # of `call`, which have the lock or wait for it
        self.closed = False  # whether the engine has exited
        self.unfinished = 0  # changes that have begun and not come to their end

    def call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Calls `function` while no other thread is in one."""
        self.check_process()  # in a forked child nobody may ever release the lock
        # A plain token: a reference to the function would keep its engine alive for ever if an
        # interrupt left it here.
        caller = object()
        try:
            self.callers.add(caller)
            return exclusive(self.lock, function, *args, **options)
        finally:
            self.callers.discard(caller)

    def change(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """The same, for what must not come within a call: that goes on with what it knew before."""
        self.check_outside()
        return self.call(function, *args, **options)

    def check_outside(self) -> None:
        """Raises RuntimeError within a call of this thread."""
        if self.is_within:
            raise RuntimeError(
                "this thread is in the middle of a call of this engine: a signal handler or "
                "destructor may only abort requests, close streams and exit"
            )

    @property
    def is_within(self) -> bool:
        """Whether this thread is in a call, which a signal handler or a destructor interrupts."""
        return self.lock._is_owned()  # type: ignore[attr-defined]

    def give_way(self) -> None:
        """Lets others have the lock, which a thread that steps in a loop would keep for itself."""
        if self.callers:
            time.sleep(1e-4)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Surrounds every change of state."""
        self.check_open()
        self.unfinished += 1
        yield
        self.unfinished -= 1  # not in a `finally`: what was broken off stays counted

    def check_open(self) -> None:
        """Raises RuntimeError if the engine has exited, or is another process's."""
        self.check_process()
        if self.closed:
            raise RuntimeError("this engine has exited; make a new one")

    def check_process(self) -> None:
        """Raises RuntimeError in a forked child."""
        if not self.is_own_process():
            raise RuntimeError(
                f"this engine belongs to process {self.process_id}, and process {os.getpid()} "
                "was forked from it: make a new one"
            )

    def is_own_process(self) -> bool:
        """Whether this is no forked child, in which everything is still the parent's."""
        return os.getpid() == self.process_id

    def call_at_exit(self, function: Callable[[], object]) -> None:
        """Calls `function`, unless this is a forked child or a step never ends; nobody follows."""
        if self.is_own_process() and self.lock.acquire(timeout=EXIT_SECONDS):
            function()
