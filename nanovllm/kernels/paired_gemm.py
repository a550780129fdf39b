"""Linear layers for tens to hundreds of tokens whose outputs are wanted in pairs.

Gate and up: ``silu(gate) * up`` pairs feature i with feature I + i. Query and key heads: the
rotation pairs element i of a head with i + D/2, and a norm needs the whole head. In both cases a
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
from nanovllm.kernels.dependent_launch import let_next_begin, wait_for_previous
from nanovllm.kernels.device import usable_sms
from nanovllm.kernels.normed import HeadInputs
from nanovllm.kernels.paging import row_of_slot
from nanovllm.kernels.small_gemm import MAX_ROWS as _FEW_ROWS

_MAX_ROWS_SILU = 256
_MAX_ROWS_HEADS = 512
_PAIR = 2 * tiling.FEATURES  # features of both tiles; the elements of a head
_MULTIPLES = _PAIR, tiling.LONG_STEP


def supports_silu_mul(x: Tensor, weight: Tensor) -> bool:
    """Whether ``linear_silu_mul`` takes these and is fast for them."""
    return x.shape[0] <= _MAX_ROWS_SILU and tiling.is_faster_for(weight, *_MULTIPLES)


def supports_heads(x: Tensor, weight: Tensor, inputs: HeadInputs) -> bool:
    """Whether ``linear_norm_rope_store`` takes these and is fast for them."""
    fits = inputs.cos_sin.shape[1] == _PAIR and x.shape[0] <= _MAX_ROWS_HEADS
    return fits and tiling.is_faster_for(weight, *_MULTIPLES)


def row_counts(weight: Tensor) -> list[int]:
    """A number of rows for every tiling of a layer with this weight; none if it is too large."""
    tilings: dict[tiling.Tiling, int] = {}
    if tiling.is_faster_for(weight, *_MULTIPLES):
        pairs, num_sms = weight.shape[0] // _PAIR, usable_sms(weight.device)
        for rows in range(_FEW_ROWS + 1, _MAX_ROWS_HEADS + 1):
            tilings.setdefault(tiling.choose(rows, pairs, num_sms), rows)
    return list(tilings.values())


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` for ``weight [2I, K]``; see ``reference``.

    Raises:
        ValueError: for a weight whose rows or columns are not multiples of 128.
    """
    tiling.check(weight, *_MULTIPLES)
    rows, inter = x.shape[0], weight.shape[0] // 2
    out = torch.empty(rows, inter, dtype=x.dtype, device=x.device)
    if rows > 0:
        grid, tile = _tiles(x, inter // tiling.FEATURES)
        _silu_mul_kernel[grid](
            *tiling.operands(x, weight, tile),
            out,
            rows,
            INTER=inter,
            INNER=x.shape[1],
            **tiling.options(tile),
        )
    return out


def linear_norm_rope_store(
    x: Tensor, weight: Tensor, bias: Tensor | None, inputs: HeadInputs
) -> Tensor:
    """QKV layer, then ``qk_norm_rope_store``; see ``reference.linear_norm_rope_store``.

    Args:
        x: ``[T, K]``.
        weight: ``[(Hq + 2 Hkv) * 128, K]``.
        bias: ``[(Hq + 2 Hkv) * 128]`` or None.
        inputs: of heads of 128 elements; their caches are written in place.

    Returns:
        ``q [T, Hq, 128]`` in x's dtype.

    Raises:
        ValueError: for another head_dim, or an inner dimension that is no multiple of 128.
    """
    tiling.check(weight, *_MULTIPLES)
    head_dim = inputs.cos_sin.shape[1]
    if head_dim != _PAIR:
        raise ValueError(f"head_dim is {head_dim}; it must be {_PAIR}")
    rows, q_heads, kv_heads = x.shape[0], inputs.num_q_heads, inputs.num_kv_heads
    q = torch.empty(rows, q_heads, head_dim, dtype=x.dtype, device=x.device)
    if rows > 0:
        grid, tile = _tiles(x, q_heads + 2 * kv_heads)
        _norm_rope_store_kernel[grid](
            *tiling.operands(x, weight, tile),
            bias,
            q,
            inputs.q_weight,
            inputs.k_weight,
            inputs.cos_sin,
            inputs.positions,
            inputs.slot_mapping,
            inputs.k_cache,
            inputs.v_cache,
            inputs.eps,
            rows,
            Q_HEADS=q_heads,
            KV_HEADS=kv_heads,
            BLOCK_SIZE=inputs.k_cache.shape[2],
            INNER=x.shape[1],
            **tiling.options(tile),
        )
    return q


def _tiles(x: Tensor, pairs: int) -> tuple[tuple[int, int], tiling.Tiling]:
    """The grid, tiles of tokens by pairs of tiles of features, and the tiles."""
    tile = tiling.choose(x.shape[0], pairs, usable_sms(x.device))
    return (triton.cdiv(x.shape[0], tile.tokens), pairs), tile


@triton.jit
def _two_products(
    x,
    weight,
    token,
    row1,
    row2,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Two tiles ``[FEATURES, TOKENS]`` of ``weight @ x.T``."""
    wait_for_previous(OVERLAP)
    first = tl.zeros([FEATURES, TOKENS], tl.float32)
    second = tl.zeros([FEATURES, TOKENS], tl.float32)
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
    INTER: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start, row = tl.program_id(0) * TOKENS, tl.program_id(1) * FEATURES
    gate, up = _two_products(
        x, weight, start, row, INTER + row, INNER, TOKENS, FEATURES, BLOCK, OVERLAP
    )
    result = tl.trans(gate * tl.sigmoid(gate) * up)
    token = (start + tl.arange(0, TOKENS))[:, None]
    place = out + token * INTER + row + tl.arange(0, FEATURES)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=token < tokens)


# The alignment of positions and slots, read one by one, varies with the batch.
@triton.jit(do_not_specialize=["positions", "slot_mapping", "tokens"])
def _norm_rope_store_kernel(
    x,
    weight,
    bias,
    q,
    q_weight,
    k_weight,
    cos_sin,
    positions,
    slot_mapping,
    k_cache,
    v_cache,
    eps,
    tokens,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # FEATURES are half a head; x1 and x2 are its halves, [FEATURES, TOKENS].
    start, head = tl.program_id(0) * TOKENS, tl.program_id(1)
    row = head * (2 * FEATURES)
    x1, x2 = _two_products(
        x, weight, start, row, row + FEATURES, INNER, TOKENS, FEATURES, BLOCK, OVERLAP
    )

    token = start + tl.arange(0, TOKENS)
    exists = token < tokens
    column = tl.arange(0, FEATURES)[:, None]
    wanted = tl.broadcast_to(exists[None, :], [FEATURES, TOKENS])
    if bias is not None:
        x1 += tl.load(bias + row + column).to(tl.float32)
        x2 += tl.load(bias + row + FEATURES + column).to(tl.float32)
    if head < Q_HEADS + KV_HEADS:
        if q_weight is not None:
            norm_weight = q_weight
            if head >= Q_HEADS:
                norm_weight = k_weight
            inverse = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=0) / (2 * FEATURES) + eps)[None, :]
            x1 = x1 * inverse * tl.load(norm_weight + column).to(tl.float32)
            x2 = x2 * inverse * tl.load(norm_weight + FEATURES + column).to(tl.float32)
        position = tl.load(positions + token, mask=exists, other=0)[None, :]
        angle = cos_sin + position * (2 * FEATURES) + column
        cos = tl.load(angle, mask=wanted, other=0.0)
        sin = tl.load(angle + FEATURES, mask=wanted, other=0.0)
        rotated = x1 * cos - x2 * sin
        x2 = x2 * cos + x1 * sin
        x1 = rotated

    if head < Q_HEADS:
        place = q + (token * Q_HEADS + head)[None, :] * (2 * FEATURES) + column
    else:
        cache = k_cache
        kv_head = head - Q_HEADS
        if head >= Q_HEADS + KV_HEADS:
            cache = v_cache
            kv_head -= KV_HEADS
        slot = tl.load(slot_mapping + token, mask=exists, other=0)
        cache_row = row_of_slot(slot, kv_head, KV_HEADS, BLOCK_SIZE)
        place = cache + cache_row[None, :] * (2 * FEATURES) + column
    tl.store(place, x1.to(q.dtype.element_ty), mask=wanted)
    tl.store(place + FEATURES, x2.to(q.dtype.element_ty), mask=wanted)
