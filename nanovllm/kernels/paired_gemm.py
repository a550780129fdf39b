"""Linear layers for tens to hundreds of tokens whose outputs are wanted in pairs.

Gate and up: ``silu(gate) * up`` pairs feature i with feature I + i. Query and key heads: the
rotation pairs element i of a head with i + D/2, and the norm needs the whole head. In both cases a
program multiplies the same tokens with two tiles of the weight and finishes the pair in registers,
so the product never goes to memory and the kernel after it is not launched.

Floor: read M K elements of weight. On an H200 (bf16, Qwen3-0.6B; us, then cuBLAS with the kernel
that follows it), gate and up, 16 to 256 tokens: 6.6 to 9.5 (7.8 to 10.1); QKV with norm, rotation
and store, 16 to 512 tokens: 6.9 to 11.6 (7.6 to 13.2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import tiling
from nanovllm.kernels.dependent_launch import launch_options, let_next_begin, wait_for_previous
from nanovllm.kernels.normed import HeadWork

_MAX_ROWS_SILU = 256
_MAX_ROWS_HEADS = 512
_PAIR = 2 * tiling.FEATURES  # features of both tiles; the elements of a head


def supports_silu_mul(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear_silu_mul`` takes these and is fast for them."""
    return x.shape[0] <= _MAX_ROWS_SILU and _is_fit(weight)


def supports_heads(x: Tensor, weight: Tensor, bias: Tensor | None, heads: HeadWork) -> bool:
    """Whether ``linear_norm_rope_store`` takes these and is fast for them."""
    is_pair = heads.q_weight.shape[0] == _PAIR
    return bias is None and is_pair and x.shape[0] <= _MAX_ROWS_HEADS and _is_fit(weight)


def row_counts(weight: Tensor) -> list[int]:
    """A number of rows for every tiling of a layer with this weight; none if it is too large."""
    tilings: dict[tiling.Tiling, int] = {}
    if _is_fit(weight):
        num_sms = tiling.sm_count(weight.device)
        for rows in range(1, _MAX_ROWS_HEADS + 1):
            tilings.setdefault(tiling.choose(rows, weight.shape[0] // _PAIR, num_sms), rows)
    return list(tilings.values())


def _is_fit(weight: Tensor) -> bool:
    features, inner = weight.shape
    return tiling.is_small(weight) and features % _PAIR == 0 and inner % tiling.LONG_STEP == 0


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` for ``weight [2I, K]``; see ``reference``."""
    inter = weight.shape[0] // 2
    out = torch.empty(x.shape[0], inter, dtype=x.dtype, device=x.device)
    _launch(_silu_mul_kernel, x, weight, inter // tiling.FEATURES, out, HALF_FEATURES=inter)
    return out


def linear_norm_rope_store(x: Tensor, weight: Tensor, heads: HeadWork) -> Tensor:
    """QKV layer, then ``qk_norm_rope_store``; see ``reference.linear_norm_rope_store``.

    Args:
        x: ``[T, K]``.
        weight: ``[(Hq + 2 Hkv) * 128, K]``.
        heads: head_dim 128; its caches are written in place.

    Returns:
        ``q [T, Hq, 128]`` in x's dtype.
    """
    num_heads = heads.num_q_heads + 2 * heads.num_kv_heads
    q = torch.empty(x.shape[0], heads.num_q_heads, _PAIR, dtype=x.dtype, device=x.device)
    *tensors, num_q_heads, num_kv_heads = heads
    _launch(
        _norm_rope_store_kernel,
        x,
        weight,
        num_heads,
        q,
        *tensors,
        Q_HEADS=num_q_heads,
        KV_HEADS=num_kv_heads,
        BLOCK_SIZE=heads.k_cache.shape[2],
    )
    return q


def _launch(kernel, x: Tensor, weight: Tensor, pairs: int, out: Tensor, *args, **constants) -> None:
    rows, inner = x.shape
    x, weight = x.contiguous(), weight.contiguous()
    tile = tiling.choose(rows, pairs, tiling.sm_count(x.device))
    kernel[(triton.cdiv(rows, tile.tokens), pairs)](
        tiling.describe(x, tile.tokens, tile.block),
        tiling.describe(weight, tiling.FEATURES, tile.block),
        out,
        *args,
        rows,
        **constants,
        INNER=inner,
        TOKENS=tile.tokens,
        HALF=tiling.FEATURES,
        BLOCK=tile.block,
        num_warps=tiling.NUM_WARPS,
        num_stages=tiling.NUM_STAGES,
        **launch_options(),
    )


@triton.jit
def _two_products(
    x,
    weight,
    token,
    row1,
    row2,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Two tiles ``[HALF, TOKENS]`` of ``weight @ x.T``."""
    wait_for_previous(OVERLAP)
    first = tl.zeros([HALF, TOKENS], tl.float32)
    second = tl.zeros([HALF, TOKENS], tl.float32)
    for inner in range(0, INNER, BLOCK):
        values = tl.trans(x.load([token, inner]))
        first = tl.dot(weight.load([row1, inner]), values, first)
        second = tl.dot(weight.load([row2, inner]), values, second)
    let_next_begin(OVERLAP)
    return first, second


@triton.jit(do_not_specialize=["tokens"])
def _silu_mul_kernel(
    x,
    weight,
    out,
    tokens,
    HALF_FEATURES: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start, row = tl.program_id(0) * TOKENS, tl.program_id(1) * HALF
    gate, up = _two_products(
        x, weight, start, row, HALF_FEATURES + row, INNER, TOKENS, HALF, BLOCK, OVERLAP
    )
    result = tl.trans(gate * tl.sigmoid(gate) * up)
    token = (start + tl.arange(0, TOKENS))[:, None]
    place = out + token * HALF_FEATURES + row + tl.arange(0, HALF)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=token < tokens)


# The alignment of positions and slots, read one by one, varies with the batch.
@triton.jit(do_not_specialize=["positions", "slot_mapping", "tokens"])
def _norm_rope_store_kernel(
    x,
    weight,
    q,
    q_weight,
    k_weight,
    eps,
    cos_sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    tokens,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start, head = tl.program_id(0) * TOKENS, tl.program_id(1)
    row = head * (2 * HALF)
    x1, x2 = _two_products(x, weight, start, row, row + HALF, INNER, TOKENS, HALF, BLOCK, OVERLAP)

    token = start + tl.arange(0, TOKENS)
    exists = token < tokens
    column = tl.arange(0, HALF)[:, None]
    wanted = exists[None, :] & (column < HALF)
    if head < Q_HEADS + KV_HEADS:
        norm_weight = q_weight
        if head >= Q_HEADS:
            norm_weight = k_weight
        inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=0) / (2 * HALF) + eps)[None, :]
        x1 = x1 * inverse * tl.load(norm_weight + column).to(tl.float32)
        x2 = x2 * inverse * tl.load(norm_weight + HALF + column).to(tl.float32)
        position = tl.load(positions + token, mask=exists, other=0)[None, :]
        angle = cos_sin + position * (2 * HALF) + column
        cos = tl.load(angle, mask=wanted, other=0.0)
        sin = tl.load(angle + HALF, mask=wanted, other=0.0)
        rotated = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = rotated

    if head < Q_HEADS:
        place = q + (token * Q_HEADS + head)[None, :] * (2 * HALF) + column
    else:
        cache = k_cache
        kv_head = head - Q_HEADS
        if head >= Q_HEADS + KV_HEADS:
            cache = v_cache
            kv_head -= KV_HEADS
        # Rows times head_dim can exceed 2^31.
        slot = tl.load(slot_mapping + token, mask=exists, other=0).to(tl.int64)[None, :]
        block_row = (slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE
        place = cache + (block_row + slot % BLOCK_SIZE) * (2 * HALF) + column
    tl.store(place, x1.to(q.dtype.element_ty), mask=wanted)
    tl.store(place + HALF, x2.to(q.dtype.element_ty), mask=wanted)
