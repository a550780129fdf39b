"""Tells the matrix-product library how many SMs it has.

cuBLAS plans its tiles for all SMs of the device. On a green context's partition that leaves SMs
idle in every last round: on 96 SMs of an H200 the products of a Qwen3-8B layer, for 512 tokens,
reach 361 to 474 TFLOP/s. cuBLASLt takes the number of SMs as an argument: 543 to 616 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def can_limit_sms() -> bool:
    """Whether this torch can pass a number of SMs to cuBLASLt (2.8 and newer)."""
    return hasattr(torch._C, "_set_sm_carveout_experimental")


@contextmanager
def limited_to(num_sms: int, device_sms: int) -> Iterator[None]:
    """Matrix products issued inside are planned for `num_sms` of the device's `device_sms` SMs.

    To be put around the capture of a graph, or around eager work: what counts is when a product is
    issued, not when it runs. Without effect where torch cannot pass the number on.
    """
    if num_sms >= device_sms or not can_limit_sms():
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


def current_limit(device_sms: int) -> int:
    """The SMs, of the device's, that a matrix product issued now is planned for.

    Our own linear layers go by it, too.
    """
    carveout = torch._C._get_sm_carveout_experimental() if can_limit_sms() else None
    return device_sms - (carveout or 0)
