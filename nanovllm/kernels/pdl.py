"""Programmatic dependent launch (PDL): a kernel begins while the one before it still ends.

A decode step is a long chain of short kernels. With PDL a kernel says, when its programs are nearly
done, that the next may be launched. The programs of that one prepare what needs no result of the
step, and then wait for the end of the kernel before and for its writes. See the CUDA programming
guide, "Programmatic Dependent Launch and Synchronization".

NOTE: every program of a kernel launched this way must wait before it writes, and before it reads
what the kernel before has made. What is older, as the inputs of a step are, may be read earlier.
NOTE: `pdl_trigger` belongs behind the main loop: the next kernel takes SMs once all programs have
called it. In a kernel that mostly waits it may come first, but behind `pdl_wait`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.kernels.gpu import is_hopper_or_newer


def pdl_options() -> dict[str, bool]:
    """What to launch a kernel with that has a constant PDL for the functions below."""
    if is_hopper_or_newer():
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Go on once the kernel before has ended and its writes are visible."""
    if PDL:
        gdc_wait()


@triton.jit
def pdl_trigger(PDL: tl.constexpr):
    """The next kernel may be launched as soon as all programs have come here or ended."""
    if PDL:
        gdc_launch_dependents()
