"""What the kernels ask about the GPU, and how cuBLAS learns of a partition. Needs no Triton.

cuBLAS plans its tiles for all SMs of the device, which leaves SMs of a green context's partition
idle in every last round. cuBLASLt takes the number of SMs as an argument.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanovllm.utils.device import sm_count

logger = logging.getLogger(__name__)


@functools.cache
def is_hopper_or_newer() -> bool:
    """Whether the current device has bulk copies (TMA) and programmatic dependent launch."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@functools.cache
def has_large_tiles(device: torch.device) -> bool:
    """Whether a program can feed tensor cores from 200 KiB of tiles in shared memory."""
    # Hopper, Blackwell's data centre GPUs, and the interpreter.
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major in (9, 10)


def usable_sms(device: torch.device) -> int:
    """SMs that a matrix product issued now is planned for; in the interpreter 132."""
    if device.type != "cuda":
        return 132
    carveout = torch._C._get_sm_carveout_experimental() if can_limit_cublas_sms() else None
    return sm_count(device) - (carveout or 0)


def can_limit_cublas_sms() -> bool:
    """Whether this torch can pass a number of SMs to cuBLASLt (2.8 and newer)."""
    return hasattr(torch._C, "_set_sm_carveout_experimental")


@contextmanager
def cublas_sm_limit(num_sms: int, device_sms: int) -> Iterator[None]:
    """Matrix products issued inside are planned for `num_sms` of the device's `device_sms` SMs.

    What counts is when a product is issued or captured, not when it runs. Our own linear layers go
    by it, too. Without effect, but for a warning, where torch cannot pass the number on.
    """
    if num_sms < device_sms and not can_limit_cublas_sms():
        _warn_that_sms_are_not_limited()
    if num_sms >= device_sms or not can_limit_cublas_sms():
        yield
        return
    # NOTE: both settings are the process's, so other threads must not issue products meanwhile.
    library = torch.backends.cuda.preferred_blas_library()
    carveout = torch._C._get_sm_carveout_experimental()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(device_sms - num_sms)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(carveout)
        torch.backends.cuda.preferred_blas_library(library)


@functools.cache
def _warn_that_sms_are_not_limited() -> None:
    logger.warning(
        "torch %s cannot tell cuBLAS how many SMs a partition has: expect pipeline modes with "
        "partitions to be slower than sequential decode; torch 2.8 and newer can",
        torch.__version__,
    )
