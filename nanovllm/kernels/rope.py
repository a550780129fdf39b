"""Everything between the QKV projection and attention, in one kernel.

One program takes a few heads of one token. Query, key and value heads run through the same
arithmetic, with values selected per head at the end, so a program may hold heads of all three
kinds. A head is read as two halves, because the rotation pairs element i with i + D/2. Floor: read
and write T (Hq + 2 Hkv) D elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.normed import HeadInputs
from nanovllm.kernels.paging import row_of_slot
from nanovllm.kernels.pdl import pdl_options, pdl_trigger, pdl_wait

_HEADS_PER_PROGRAM = 8


def qk_norm_rope_store(qkv: Tensor, inputs: HeadInputs) -> Tensor:
    """See ``reference.qk_norm_rope_store``; rows of `qkv` may be strided, all else may not."""
    num_tokens, head_dim = qkv.shape[0], inputs.cos_sin.shape[1]
    q_heads, kv_heads, half = inputs.num_q_heads, inputs.num_kv_heads, head_dim // 2
    q = torch.empty(num_tokens, q_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q
    _norm_rope_store_kernel[num_tokens, triton.cdiv(q_heads + 2 * kv_heads, _HEADS_PER_PROGRAM)](
        qkv, inputs.q_weight, inputs.k_weight, inputs.cos_sin, inputs.positions,
        inputs.slot_mapping, q, inputs.k_cache, inputs.v_cache, inputs.eps, qkv.stride(0),
        Q_HEADS=q_heads, KV_HEADS=kv_heads, BLOCK_SIZE=inputs.k_cache.shape[2],
        HALF=half, HEADS=_HEADS_PER_PROGRAM,
        # One 16-byte load of a 16-bit dtype per thread and half.
        num_warps=max(_HEADS_PER_PROGRAM * half // 256, 1),
        **pdl_options(),
    )  # fmt: skip
    return q


# The alignment of positions and slots, read one by one, varies with the batch.
@triton.jit(do_not_specialize=["positions", "slot_mapping"])
def _norm_rope_store_kernel(
    qkv, q_weight, k_weight, cos_sin, positions, slot_mapping, q, k_cache, v_cache, eps,
    qkv_stride,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pdl_wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_q = head < Q_HEADS
    is_k = (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    is_v = (head >= Q_HEADS + KV_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
    column = tl.arange(0, HALF)[None, :]
    if q_weight is not None:
        weight1 = tl.where(is_q[:, None], tl.load(q_weight + column), tl.load(k_weight + column))
        weight2 = tl.where(
            is_q[:, None], tl.load(q_weight + HALF + column), tl.load(k_weight + HALF + column)
        )

    source = qkv + token * qkv_stride + head[:, None] * (2 * HALF) + column
    exists = (is_q | is_k | is_v)[:, None]
    raw1 = tl.load(source, mask=exists, other=0.0)
    raw2 = tl.load(source + HALF, mask=exists, other=0.0)
    x1 = raw1.to(tl.float32)
    x2 = raw2.to(tl.float32)

    pdl_trigger(PDL)
    position = tl.load(positions + token)
    cos = tl.load(cos_sin + position * (2 * HALF) + column)
    sin = tl.load(cos_sin + position * (2 * HALF) + HALF + column)
    if q_weight is not None:
        inverse = inverse_rms(x1, x2, eps, 2 * HALF, 1)
        x1 = x1 * inverse * weight1.to(tl.float32)
        x2 = x2 * inverse * weight2.to(tl.float32)
    y1, y2 = rotate(x1, x2, cos, sin)
    y1 = y1.to(raw1.dtype)
    y2 = y2.to(raw1.dtype)

    q_out = q + (token * Q_HEADS + head[:, None]) * (2 * HALF) + column
    tl.store(q_out, y1, mask=is_q[:, None])
    tl.store(q_out + HALF, y2, mask=is_q[:, None])
    slot = tl.load(slot_mapping + token)
    k_out = k_cache + row_of_slot(slot, head - Q_HEADS, KV_HEADS, BLOCK_SIZE)[:, None] * (2 * HALF)
    tl.store(k_out + column, y1, mask=is_k[:, None])
    tl.store(k_out + HALF + column, y2, mask=is_k[:, None])
    v_head = head - Q_HEADS - KV_HEADS
    v_out = v_cache + row_of_slot(slot, v_head, KV_HEADS, BLOCK_SIZE)[:, None] * (2 * HALF)
    tl.store(v_out + column, raw1, mask=is_v[:, None])
    tl.store(v_out + HALF + column, raw2, mask=is_v[:, None])


@triton.jit
def inverse_rms(x1, x2, eps, HEAD_DIM: tl.constexpr, AXIS: tl.constexpr):
    """``1 / rms`` of heads given as halves along an axis, which stays with size 1."""
    squares = tl.sum(x1 * x1 + x2 * x2, axis=AXIS)
    return tl.expand_dims(tl.rsqrt(squares / HEAD_DIM + eps), AXIS)


@triton.jit
def rotate(x1, x2, cos, sin):
    """Rotary embedding of heads given as halves."""
    return x1 * cos - x2 * sin, x2 * cos + x1 * sin
