"""Linear layers for a handful of tokens, where reading the weights is all that takes time.

One program computes a few output features of all tokens. Its warps divide the inner dimension
among them and add up their sums at the end, which keeps every SM loading even when there are only a
thousand features. For the gated MLP a program computes the same features of both halves and ends
with ``silu(gate) * up``. Floor: read M K elements of weight.

An RMS norm between two layers costs no launch: the layer before it adds the residual, multiplies
with the norm's weight and writes its sums of squares; the layer after it adds these up, while its
weights are on their way, and divides its output. See ``Normed``.

Behind an all-reduce, which mostly waits for the link, a layer prefetches the beginning of its
weights into L2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.gpu import is_hopper_or_newer
from nanovllm.kernels.normed import Normed
from nanovllm.kernels.pdl import pdl_options, pdl_trigger, pdl_wait

MAX_ROWS = 8
_WARPS = 4
_BLOCK = 64  # inner elements of a warp's step
_STAGES = 5
# Each program reads the values of all tokens, from L2: of so many, a third of its weights or more.
_MANY_VALUES = 5 * 4096
_ONE_WAVE = 4096  # features for which all programs run at once, with 16 each and 2 on an SM
# Of a weight, behind an all-reduce; L2 has 50 MB on an H100, 60 on an H200.
_PREFETCH_BYTES = 32 << 20


def supports(x: Tensor) -> bool:
    """Whether these layers take the input ``x [N, K]`` and are fast for it."""
    # In float32, products would not run on the tensor cores.
    return _fits(x) and x.element_size() == 2


def _fits(x: Tensor) -> bool:
    rows, inner = x.shape
    return rows <= MAX_ROWS and inner % (_WARPS * _BLOCK) == 0


def linear(
    x: Normed,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    *,
    gated: bool = False,
    norm: tuple[Tensor | None, ...] = (None,) * 4,
) -> Tensor:
    """See ``kernels.linear``, or if `gated` ``kernels.linear_silu_mul``, for N up to MAX_ROWS.

    `norm`: the kernel's arguments from `residual` to `sum_sq`, if one follows the layer.
    """
    assert _fits(x.values)
    tokens, inner = x.values.shape
    features = weight.shape[0] // (2 if gated else 1)
    values, weight = x.values.contiguous(), weight.contiguous()
    if out is None:
        out = torch.empty(tokens, features, dtype=values.dtype, device=values.device)
    if tokens > 0:
        rows = _rows(features, gated, tokens * inner)
        num_sum_sq = 0 if x.sum_sq is None else x.sum_sq.shape[1]
        _linear_kernel[(triton.cdiv(features, rows),)](
            values, x.sum_sq, weight, bias, out, *norm, x.eps, tokens,
            FEATURES=features, INNER=inner, TOKENS=triton.next_power_of_2(tokens), ROWS=rows,
            NUM_SUM_SQ=num_sum_sq, SUM_SQ_BLOCK=triton.next_power_of_2(num_sum_sq),
            SPLIT=_WARPS, BLOCK=_BLOCK, GATED=gated,
            PREFETCH=_prefetch_length(weight) if x.after_all_reduce and is_hopper_or_newer() else 0,
            num_warps=_WARPS, num_stages=_STAGES, **pdl_options(),
        )  # fmt: skip
    return out


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Normed, Tensor]:
    """See ``kernels.linear_add_norm``; the norm's division is still due.

    NOTE: until then ``s * norm_weight`` is stored in x's dtype, and float16 ends at 65504.
    """
    features = weight.shape[0]
    values = torch.empty(len(x), features, dtype=x.dtype, device=x.device)
    sum_sq = torch.empty(
        len(x), triton.cdiv(features, _rows(features)), dtype=torch.float32, device=x.device
    )
    norm = residual.contiguous(), norm_weight, values, sum_sq
    total = linear(Normed(x), weight, bias, norm=norm)
    return Normed(values, sum_sq, eps), total


def _rows(features: int, gated: bool = False, values: int = 0) -> int:
    """Features of a program: so few that an SM has two programs, but not below 8."""
    if gated:  # twice the rows of weight
        return 16 if values >= _MANY_VALUES and 2048 < features <= _ONE_WAVE else 8
    return 8 if features <= 2048 else 16


def _prefetch_length(weight: Tensor) -> int:
    """Inner elements of each row of a weight to prefetch; a power of 2, or 0."""
    rows, inner = weight.shape
    most = min(inner, _PREFETCH_BYTES // (rows * weight.element_size()))
    # Less is not worth it, and an address must be a multiple of 16 bytes.
    return 0 if most < _WARPS * _BLOCK else 1 << (most.bit_length() - 1)


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x, x_sum_sq, weight, bias, out, residual, norm_weight, scaled, sum_sq, eps, tokens,
    FEATURES: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    NUM_SUM_SQ: tl.constexpr, SUM_SQ_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK: tl.constexpr, GATED: tl.constexpr, PREFETCH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Tensors are [SPLIT, tokens or features, BLOCK]; a step takes SPLIT * BLOCK inner elements.
    token = tl.arange(0, TOKENS)
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = (tl.arange(0, SPLIT)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])[:, None, :]
    exists = (token < tokens)[None, :, None]
    x_place = token[None, :, None] * INNER + inner
    row = tl.minimum(feature, FEATURES - 1).to(tl.int64)[None, :, None]
    w_place = row * INNER + inner
    is_feature = feature < FEATURES
    place = token[:, None] * FEATURES + feature[None, :]
    wanted = (token < tokens)[:, None] & is_feature[None, :]
    if PREFETCH:
        rows = weight + tl.reshape(row, [ROWS, 1]) * INNER
        _prefetch(rows, ROWS, PREFETCH)
        if GATED:
            _prefetch(rows + FEATURES * INNER, ROWS, PREFETCH)
    pdl_wait(PDL)
    # What the end needs is asked for now.
    if x_sum_sq is not None:
        part = tl.arange(0, SUM_SQ_BLOCK)[None, :]
        there = (token < tokens)[:, None] & (part < NUM_SUM_SQ)
        parts = tl.load(x_sum_sq + token[:, None] * NUM_SUM_SQ + part, mask=there, other=0.0)
    if residual is not None:
        added = tl.load(residual + place, mask=wanted, other=0.0)
        norm_scale = tl.load(norm_weight + feature, mask=is_feature, other=0.0)

    acc = tl.zeros([SPLIT, TOKENS, ROWS], tl.float32)
    acc_up = tl.zeros([SPLIT, TOKENS, ROWS], tl.float32)
    for start in range(0, INNER, SPLIT * BLOCK):
        values = tl.load(x + x_place + start, mask=exists, other=0.0)
        w = tl.load(weight + w_place + start)
        acc = tl.dot(values, tl.trans(w, (0, 2, 1)), acc, input_precision="ieee")
        if GATED:
            w_up = tl.load(weight + FEATURES * INNER + w_place + start)
            acc_up = tl.dot(values, tl.trans(w_up, (0, 2, 1)), acc_up, input_precision="ieee")

    pdl_trigger(PDL)
    result = tl.sum(acc, axis=0)
    up = tl.sum(acc_up, axis=0)
    if x_sum_sq is not None:
        inverse = tl.rsqrt(tl.sum(parts, axis=1) / INNER + eps)[:, None]
        result *= inverse
        up *= inverse
    if GATED:
        result = result * tl.sigmoid(result) * up
    if bias is not None:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        result += added.to(tl.float32)
    result = result.to(out.dtype.element_ty)
    tl.store(out + place, result, mask=wanted)
    if residual is not None:
        # Of the rounded sum, as without the fusion; zero where there is no feature.
        result = tl.where(wanted, result.to(tl.float32), 0.0)
        tl.store(
            scaled + place,
            (result * norm_scale.to(tl.float32)[None, :]).to(out.dtype.element_ty),
            mask=wanted,
        )
        place = sum_sq + token * tl.num_programs(0) + tl.program_id(0)
        tl.store(place, tl.sum(result * result, axis=1), mask=token < tokens)


@triton.jit
def _prefetch(rows, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Prefetches the first SIZE elements, of 2 bytes, of each row into L2: a piece a thread."""
    PIECES: tl.constexpr = 128 // ROWS
    piece = rows + tl.arange(0, PIECES)[None, :] * (SIZE // PIECES)
    size = tl.full([ROWS, PIECES], 2 * SIZE // PIECES, tl.int32)
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;", "=r,l,r", [piece, size],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
