"""Waits for collectives of CPU tensors."""

from __future__ import annotations

import time

import torch.distributed as dist


def complete(work: dist.Work, timeout: float) -> None:
    """Waits for a collective of CPU tensors, so that Ctrl-C can end it.

    Raises:
        TimeoutError: it took more than `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not work.is_completed():
        if time.monotonic() > deadline:
            raise TimeoutError(f"a collective did not end within {timeout:g} s")
        time.sleep(1e-5)
    work.wait()  # raises if it failed
