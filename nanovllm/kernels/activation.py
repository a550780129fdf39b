"""SiLU of the gate times the up projection, the middle of the gated MLP.

One program computes one stretch of one row. Floor: read 2 TI elements and write TI.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.pdl import pdl_options, pdl_trigger, pdl_wait

_BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """See ``reference.silu_mul``."""
    rows, inter = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up.contiguous()
    out = torch.empty(rows, inter, dtype=gate_up.dtype, device=gate_up.device)
    if rows > 0:
        grid = (rows, triton.cdiv(inter, _BLOCK))
        _silu_mul_kernel[grid](
            gate_up, out, INTER=inter, BLOCK=_BLOCK, num_warps=4, **pdl_options()
        )
    return out


@triton.jit
def _silu_mul_kernel(gate_up, out, INTER: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < INTER
    gate_ptr = gate_up + row * (2 * INTER) + column
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + INTER, mask=inside, other=0.0).to(tl.float32)
    pdl_trigger(PDL)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out + row * INTER + column, result.to(out.dtype.element_ty), mask=inside)
