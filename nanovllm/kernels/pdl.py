"""Programmatic dependent launch (PDL): a kernel begins while the one before it still ends.

A decode step is a chain of about two hundred kernels, each of which needs the one before it.
Ordinarily a GPU launches a kernel once the one before has ended with all its writes. With PDL a
kernel says, when its programs are nearly done, that the next may be launched. The programs of that
one prepare what needs no result of the step, and then wait for the end of the kernel before and for
its writes.

NOTE: every program of a kernel launched this way must wait, before it reads what the kernel before
has made and before it writes. As each kernel waits for the end of the one before it, order is then
as usual. What is older than that, as the inputs of a step are, may be read before waiting.
NOTE: `pdl_trigger` belongs behind the main loop. The next kernel takes SMs from the moment that all
programs have called it; early in the kernel that costs more than it gains.

Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization".
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
