"""Memory that cannot be had is a MemoryError, whichever way that is found out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 1 << 30


def check_fits(num_bytes: int, device: torch.device, what: str) -> None:
    """Raises MemoryError if `device` has less memory in all than `num_bytes` for `what`."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > total:
        raise MemoryError(
            f"{what} take {num_bytes / GIB:.1f} GiB, but {device} has {total / GIB:.1f} GiB in all"
        )


@contextmanager
def cpu_memory_errors(device: torch.device, what: str) -> Iterator[None]:
    """For allocations alone: says what for, and on the CPU torch says RuntimeError instead."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if device.type != "cpu":
            raise
        raise MemoryError(f"there is no memory for {what} on {device}: {error}") from error
