"""Which device the engine runs on, and what it has; lack of memory is always a MemoryError."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch

GIB = 1 << 30


def resolve_device(wanted: str) -> torch.device:
    """The device that option `wanted` means; under torchrun "cuda" is this rank's own.

    Raises:
        ValueError: CUDA is wanted, but not there, or has no device of that number.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device={wanted!r} is not allowed: this machine has no usable CUDA GPU")
    # NOTE: torch would take the number modulo 256.
    number = int(wanted.partition(":")[2] or os.environ.get("LOCAL_RANK", "0"))
    present = torch.cuda.device_count()
    if number >= present:
        raise ValueError(
            f"device={wanted!r} is not allowed: this machine's CUDA devices are numbered from 0 to "
            f"{present - 1}, and {number} is not among them"
        )
    return torch.device("cuda", number)


def resolve_dtype(wanted: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype that option `wanted` means; "auto": the checkpoint's on CUDA, else float32."""
    if wanted == "auto":
        wanted = checkpoint if device.type == "cuda" else "float32"
    return getattr(torch, wanted)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on `device`, which is not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@functools.cache
def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 0 for any other."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, operations have the configured dtype, whatever `torch.autocast` the caller is in."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


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


@contextmanager
def single_thread() -> Iterator[None]:
    """Operations inside take one thread of the CPU: small ones only wait for the others."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
