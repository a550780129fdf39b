"""RMS norm, alone and fused with the residual addition before it.

One program normalises one row, which it reads once and keeps in registers. What a split linear
layer left in parts is added up on the way. Floor: 2 TH elements, with a residual 4 TH.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.pdl import pdl_options, pdl_trigger, pdl_wait


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See ``reference.rms_norm``."""
    x = x.contiguous()
    y = torch.empty_like(x)
    _launch(x, None, weight, y, None, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See ``reference.add_rms_norm``."""
    return add_parts_rms_norm(x.unsqueeze(0), residual, weight, eps)


def add_parts_rms_norm(
    parts: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` of ``x = parts.sum(0)`` for ``parts [P, T, H]``, summed in float32."""
    parts, residual = parts.contiguous(), residual.contiguous()
    y, total = torch.empty_like(residual), torch.empty_like(residual)
    _launch(parts, residual, weight, y, total, eps, num_parts=len(parts))
    return y, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    y: Tensor,
    total: Tensor | None,
    eps: float,
    num_parts: int = 1,
) -> None:
    hidden = y.shape[-1]
    rows = y.numel() // hidden
    if rows == 0:
        return
    block = triton.next_power_of_2(hidden)
    # 8 elements a thread are one 16-byte load of a 16-bit dtype.
    warps = min(max(block // 256, 1), 8)
    _rms_norm_kernel[(rows,)](
        x, residual, weight, y, total, eps,
        HIDDEN=hidden, BLOCK=block, PARTS=num_parts, num_warps=warps, **pdl_options(),
    )  # fmt: skip


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, y, total, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    values = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    part = tl.num_programs(0).to(tl.int64) * HIDDEN
    for index in tl.static_range(1, PARTS):
        values += tl.load(x + index * part + row + column, mask=inside, other=0.0)
    if residual is not None:
        added = tl.load(residual + row + column, mask=inside, other=0.0)
        # Rounded to the dtype before it is normalised, as without the fusion.
        rounded = (values + added.to(tl.float32)).to(added.dtype)
        tl.store(total + row + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    pdl_trigger(PDL)
    inverse = tl.rsqrt(tl.sum(values * values, axis=0) / HIDDEN + eps)
    tl.store(y + row + column, (values * inverse * scale).to(y.dtype.element_ty), mask=inside)
