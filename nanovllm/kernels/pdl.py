"""Programmatic dependent launch: a kernel starts while the one before it still runs (Hopper).

Between two kernels of a stream the GPU idles for about a microsecond, as long as the smallest of
them take. A kernel launched with this option is placed on the SMs as soon as every program of the
kernel before it has called ``let_next_start``, and stands ready when that one ends:

- ``wait_for_inputs`` returns once the kernel before has finished and its results are visible.
  Every program calls it before it reads anything that the step computes, and before it writes.
- ``let_next_start`` may come at any point, also at the very start.

Both do nothing in a kernel that is launched without the option. See "Programmatic Dependent
Launch and Synchronization" in the CUDA C++ Programming Guide.
"""

import triton
import triton.language as tl
from torch import Tensor, cuda

enabled = False


def options(x: Tensor) -> dict[str, bool]:
    """Arguments for launching a kernel with a ``PDL`` constant on x's device."""
    use = enabled and x.is_cuda and cuda.get_device_capability(x.device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if use else {"PDL": False}


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
