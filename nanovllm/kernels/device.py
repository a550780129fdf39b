"""What the kernels ask about the GPU."""

import functools

import torch

from nanovllm.kernels.library_sms import current_limit


@functools.cache
def is_hopper_or_newer() -> bool:
    """Whether the current device has bulk copies (TMA) and programmatic dependent launch."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


@functools.cache
def has_large_tiles(device: torch.device) -> bool:
    """Whether a program can keep 200 KiB of tiles in shared memory and feed tensor cores from it.

    So it is on Hopper and on Blackwell's data centre GPUs (227 KiB), and in the interpreter.
    """
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major in (9, 10)


def usable_sms(device: torch.device) -> int:
    """SMs that a matrix product issued now is planned for; in the interpreter those of an H200."""
    return current_limit(_sm_count(device)) if device.type == "cuda" else 132


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
