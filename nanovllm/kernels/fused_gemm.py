"""Linear layers for tens to hundreds of tokens, fused with what follows them.

What counts is that every SM reads a part of the weight, and that few launches surround it. So a
tile has 64 features; a weight is the left operand of the tensor cores, which want 64 rows of it,
but take 16 tokens on the right; and there are as many tiles of tokens as give every SM a program.

- In pairs: gate and up pair feature i with I + i for ``silu(gate) * up``. The rotation of query and
  key heads pairs element i with i + D/2, and their norm needs the whole head. So a program
  multiplies the same tokens with two tiles of the weight and finishes the pair in registers.
- Split-K: output and down projection have few features, so their inner dimension is divided as
  well, or most SMs would idle. The parts stay apart, in float32, and the norm that follows, which
  reads every row anyway, adds them up.

Larger weights are left to cuBLAS. Floor: read M K elements of weight.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels import norm
from nanovllm.kernels.gpu import has_large_tiles, usable_sms
from nanovllm.kernels.normed import HeadInputs
from nanovllm.kernels.paging import row_of_slot
from nanovllm.kernels.pdl import pdl_options, pdl_trigger, pdl_wait
from nanovllm.kernels.rope import inverse_rms, rotate

_MAX_WEIGHT_BYTES = 16 * 2**20
_MAX_ROWS_SILU = 256
_MAX_ROWS_HEADS = 512
_MAX_INPUT_HEADS = 512 * 1024  # elements: with more, cuBLAS has enough to do
_MAX_ROWS_SPLIT = 256

_FEATURES = 64  # rows of weight in a tile
_TOKENS = (16, 32, 64)
_LONG_STEP, _SHORT_STEP = 128, 64  # inner elements
_SPLITS = 4, 2
_PAIR = 2 * _FEATURES  # features of both tiles; the elements of a head
# What the rows and columns of a weight must be multiples of.
_PAIRED = _PAIR, _LONG_STEP
_SPLIT = _FEATURES, max(_SPLITS) * _LONG_STEP


class Tiles(NamedTuple):
    tokens: int  # of a tile
    block: int  # inner elements of a step


# ------------------------------------------------------------------ which layers come here


def supports_silu_mul(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear_silu_mul` takes these and is fast for them."""
    return x.shape[0] <= _MAX_ROWS_SILU and _beats_cublas(weight, _PAIRED)


def supports_heads(x: Tensor, weight: Tensor, inputs: HeadInputs) -> bool:
    """Whether `linear_norm_rope_store` takes these and is fast for them."""
    few = x.shape[0] <= _MAX_ROWS_HEADS and x.numel() <= _MAX_INPUT_HEADS
    return few and inputs.cos_sin.shape[1] == _PAIR and _beats_cublas(weight, _PAIRED)


def supports_add_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear_add_norm` takes these and is fast for them."""
    return bias is None and x.shape[0] <= _MAX_ROWS_SPLIT and _beats_cublas(weight, _SPLIT)


def pick_tiles(rows: int, feature_tiles: int, num_sms: int) -> Tiles:
    """The smallest with which `feature_tiles` give each SM no more than one program."""
    for tokens in _TOKENS:
        if triton.cdiv(rows, tokens) * feature_tiles <= num_sms:
            # One program has an SM to itself, and with it room for long steps.
            return Tiles(tokens, _LONG_STEP)
    return Tiles(_TOKENS[-1], _SHORT_STEP)


def pick_splits(rows: int, features: int, num_sms: int) -> tuple[int, Tiles]:
    """Parts of the inner dimension, and tiles: four parts while each SM has one program, or two."""
    for splits in _SPLITS:
        tiles = pick_tiles(rows, features // _FEATURES * splits, num_sms)
        if tiles.block == _LONG_STEP:
            break
    return splits, tiles


def _beats_cublas(weight: Tensor, multiples: tuple[int, int]) -> bool:
    return (
        weight.element_size() == 2
        and _fits(weight, multiples)
        and weight.nbytes < _MAX_WEIGHT_BYTES
        and has_large_tiles(weight.device)
    )


def _fits(weight: Tensor, multiples: tuple[int, int]) -> bool:
    return weight.shape[0] % multiples[0] == 0 and weight.shape[1] % multiples[1] == 0


# ------------------------------------------------------------------ launches


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """See ``kernels.linear_silu_mul``."""
    assert _fits(weight, _PAIRED)
    (rows, inner), inter = x.shape, weight.shape[0] // 2
    out = torch.empty(rows, inter, dtype=x.dtype, device=x.device)
    if rows > 0:
        pairs = inter // _FEATURES
        tiles = pick_tiles(rows, pairs, usable_sms(x.device))
        _linear_silu_mul_kernel[triton.cdiv(rows, tiles.tokens), pairs](
            *_operands(x, weight, tiles), out, rows,
            INTER=inter, INNER=inner, **kernel_options(tiles),
        )  # fmt: skip
    return out


def linear_norm_rope_store(
    x: Tensor, weight: Tensor, bias: Tensor | None, inputs: HeadInputs
) -> Tensor:
    """See ``kernels.linear_norm_rope_store``; a head has 128 elements."""
    head_dim = inputs.cos_sin.shape[1]
    assert _fits(weight, _PAIRED)
    assert head_dim == _PAIR
    (rows, inner), q_heads, kv_heads = x.shape, inputs.num_q_heads, inputs.num_kv_heads
    q = torch.empty(rows, q_heads, head_dim, dtype=x.dtype, device=x.device)
    if rows > 0:
        heads = q_heads + 2 * kv_heads
        tiles = pick_tiles(rows, heads, usable_sms(x.device))
        _linear_norm_rope_store_kernel[triton.cdiv(rows, tiles.tokens), heads](
            *_operands(x, weight, tiles), bias, q,
            inputs.q_weight, inputs.k_weight, inputs.cos_sin, inputs.positions,
            inputs.slot_mapping, inputs.k_cache, inputs.v_cache, inputs.eps, rows,
            Q_HEADS=q_heads, KV_HEADS=kv_heads, BLOCK_SIZE=inputs.k_cache.shape[2], INNER=inner,
            **kernel_options(tiles),
        )  # fmt: skip
    return q


def linear_add_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See ``kernels.linear_add_norm``; no bias."""
    return norm.add_parts_rms_norm(linear_parts(x, weight), residual, norm_weight, eps)


def linear_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 ``[P, N, M]`` whose sum over P is ``x @ weight.T`` of ``[N, K]`` and ``[M, K]``."""
    assert _fits(weight, _SPLIT)
    (rows, inner), features = x.shape, weight.shape[0]
    splits, tiles = pick_splits(rows, features, usable_sms(x.device))
    parts = torch.empty(splits, rows, features, dtype=torch.float32, device=x.device)
    if rows > 0:
        _parts_kernel[triton.cdiv(rows, tiles.tokens), features // _FEATURES, splits](
            *_operands(x, weight, tiles), parts, rows,
            OUT=features, PART=inner // splits, **kernel_options(tiles),
        )  # fmt: skip
    return parts


def kernel_options(tiles: Tiles) -> dict[str, Any]:
    """Constants and compiler options that the kernels have in common."""
    sizes = {"TOKENS": tiles.tokens, "FEATURES": _FEATURES, "BLOCK": tiles.block}
    return {**sizes, "num_warps": 4, "num_stages": 4, **pdl_options()}


def _operands(x: Tensor, weight: Tensor, tiles: Tiles) -> tuple[TensorDescriptor, TensorDescriptor]:
    """``x [N, K]`` and ``weight [M, K]`` for bulk copies of tiles; beyond their ends are zeros.

    Both must begin at a multiple of 16 bytes.
    """
    x, weight = x.contiguous(), weight.contiguous()
    return (
        TensorDescriptor.from_tensor(x, [tiles.tokens, tiles.block]),
        TensorDescriptor.from_tensor(weight, [_FEATURES, tiles.block]),
    )


# ------------------------------------------------------------------ kernels


@triton.jit
def _two_products(
    x, weight, token, row1, row2,
    INNER: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Two tiles ``[FEATURES, TOKENS]`` of ``weight @ x.T``."""
    pdl_wait(PDL)
    first = tl.zeros([FEATURES, TOKENS], tl.float32)
    second = tl.zeros([FEATURES, TOKENS], tl.float32)
    for inner in range(0, INNER, BLOCK):
        values = tl.trans(x.load([token, inner]))
        first = tl.dot(weight.load([row1, inner]), values, first)
        second = tl.dot(weight.load([row2, inner]), values, second)
    pdl_trigger(PDL)
    return first, second


@triton.jit(do_not_specialize=["tokens"])
def _linear_silu_mul_kernel(
    x, weight, out, tokens,
    INTER: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start, row = tl.program_id(0) * TOKENS, tl.program_id(1) * FEATURES
    gate, up = _two_products(
        x, weight, start, row, INTER + row, INNER, TOKENS, FEATURES, BLOCK, PDL
    )
    result = tl.trans(gate * tl.sigmoid(gate) * up)
    token = (start + tl.arange(0, TOKENS))[:, None]
    place = out + token * INTER + row + tl.arange(0, FEATURES)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=token < tokens)


# The alignment of positions and slots, read one by one, varies with the batch.
@triton.jit(do_not_specialize=["positions", "slot_mapping", "tokens"])
def _linear_norm_rope_store_kernel(
    x, weight, bias, q, q_weight, k_weight, cos_sin, positions, slot_mapping, k_cache, v_cache,
    eps, tokens,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, INNER: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # FEATURES are half a head; x1 and x2 are its halves, [FEATURES, TOKENS].
    start, head = tl.program_id(0) * TOKENS, tl.program_id(1)
    row = head * (2 * FEATURES)
    x1, x2 = _two_products(
        x, weight, start, row, row + FEATURES, INNER, TOKENS, FEATURES, BLOCK, PDL
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
            inverse = inverse_rms(x1, x2, eps, 2 * FEATURES, 0)
            x1 = x1 * inverse * tl.load(norm_weight + column).to(tl.float32)
            x2 = x2 * inverse * tl.load(norm_weight + FEATURES + column).to(tl.float32)
        position = tl.load(positions + token, mask=exists, other=0)[None, :]
        angle = cos_sin + position * (2 * FEATURES) + column
        cos = tl.load(angle, mask=wanted, other=0.0)
        sin = tl.load(angle + FEATURES, mask=wanted, other=0.0)
        x1, x2 = rotate(x1, x2, cos, sin)

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


@triton.jit(do_not_specialize=["tokens"])
def _parts_kernel(
    x, weight, parts, tokens,
    OUT: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start, row, part = tl.program_id(0) * TOKENS, tl.program_id(1) * FEATURES, tl.program_id(2)
    pdl_wait(PDL)
    acc = tl.zeros([FEATURES, TOKENS], tl.float32)
    for step in range(0, PART, BLOCK):
        inner = part * PART + step
        acc = tl.dot(weight.load([row, inner]), tl.trans(x.load([start, inner])), acc)
    pdl_trigger(PDL)
    token = (start + tl.arange(0, TOKENS))[:, None]
    place = parts + (part * tokens + token) * OUT + row + tl.arange(0, FEATURES)[None, :]
    tl.store(place, tl.trans(acc), mask=token < tokens)
