"""Linear layers for a handful of tokens, where reading the weights is all that takes time.

One program computes a few output features of all tokens. It reads its rows of the weight once,
from end to end; its warps divide the inner dimension among them and add up their sums at the end.
That keeps every SM loading even when there are only a thousand features. For the gated MLP a
program computes the same features of both halves and ends with ``silu(gate) * up``.

Products are added up in float32 and rounded once. Floor: read M K elements of weight.

An RMS norm between two layers costs no launch: the layer before it adds the residual, multiplies
with the norm's weight and writes its sums of squares; the layer after it adds these up, while its
weights are on their way, and divides its output. See ``Normed``.

On an H200 (bf16; QKV, output, gate and up with SiLU, down; us, then cuBLAS): Qwen3-0.6B, 1 token
4.4, 3.7, 5.6, 4.5 (4.9, 5.9, 7.7, 7.4), 8 tokens 4.7, 3.7, 6.1, 4.6 (5.3, 5.9, 7.5, 7.5);
Qwen3-8B, 1 token 15.6, 10.9, 52.9, 28.0 (16.1, 13.4, 51.7, 31.4).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.dependent_launch import launch_options, let_next_begin, wait_for_previous
from nanovllm.kernels.normed import Normed

MAX_ROWS = 8
_WARPS = 4
_BLOCK = 64  # inner elements of a warp's step
_STAGES = 5


def supports(x: Tensor) -> bool:
    """Whether these layers take the input ``x [N, K]`` and are fast for it.

    In float32, products would not run on the tensor cores.
    """
    rows, inner = x.shape
    return rows <= MAX_ROWS and inner % (_WARPS * _BLOCK) == 0 and x.element_size() == 2


def row_counts() -> list[int]:
    """A number of rows for every form of the kernel, each of which is compiled on its own."""
    return [1 << power for power in range(MAX_ROWS.bit_length())]


def linear(x: Normed, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for ``x [N, K]``, N up to MAX_ROWS, and ``weight [M, K]``."""
    return _launch(x, weight, bias, weight.shape[0])


def linear_silu_mul(x: Normed, gate_up_weight: Tensor) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` for ``[2I, K]``, whose first half is the gate."""
    return _launch(x, gate_up_weight, None, gate_up_weight.shape[0] // 2, gated=True)


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Normed, Tensor]:
    """``s = linear(x) + residual; return rms_norm(s), s``, the norm's division still due.

    NOTE: until then ``s * norm_weight`` is stored in x's dtype, and float16 ends at 65504.
    """
    features = weight.shape[0]
    values = torch.empty(len(x), features, dtype=x.dtype, device=x.device)
    squares = torch.empty(
        len(x), triton.cdiv(features, _rows(features)), dtype=torch.float32, device=x.device
    )
    after = _NormAfter(residual.contiguous(), norm_weight, values, squares)
    total = _launch(Normed(x), weight, bias, features, after=after)
    return Normed(values, squares, eps), total


class _NormAfter(NamedTuple):
    """What a layer with a norm after it reads besides, and where it writes the norm's beginning."""

    residual: Tensor
    norm_weight: Tensor
    scaled: Tensor
    squares: Tensor


def _rows(features: int, gated: bool = False) -> int:
    """Features of a program: so few that an SM has two programs, but not below 8."""
    return 8 if features <= 2048 or gated else 16


def _launch(
    x: Normed,
    weight: Tensor,
    bias: Tensor | None,
    features: int,
    gated: bool = False,
    after: _NormAfter | None = None,
) -> Tensor:
    tokens, inner = x.values.shape
    if tokens > MAX_ROWS:
        raise ValueError(f"x has {tokens} rows; at most {MAX_ROWS} are allowed")
    step = _WARPS * _BLOCK
    if inner % step:
        raise ValueError(f"x has {inner} columns; they must be a multiple of {step}")
    values, weight = x.values.contiguous(), weight.contiguous()
    out = torch.empty(tokens, features, dtype=values.dtype, device=values.device)
    if tokens > 0:
        rows = _rows(features, gated)
        num_squares = 0 if x.squares is None else x.squares.shape[1]
        _linear_kernel[(triton.cdiv(features, rows),)](
            values,
            x.squares,
            weight,
            bias,
            out,
            *(after or (None, None, None, None)),
            x.eps,
            tokens,
            FEATURES=features,
            INNER=inner,
            NUM_SQUARES=num_squares,
            SQUARES_BLOCK=triton.next_power_of_2(num_squares),
            TOKENS=triton.next_power_of_2(tokens),
            ROWS=rows,
            SPLIT=_WARPS,
            BLOCK=_BLOCK,
            GATED=gated,
            num_warps=_WARPS,
            num_stages=_STAGES,
            **launch_options(),
        )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x,
    x_squares,
    weight,
    bias,
    out,
    residual,
    norm_weight,
    scaled,
    squares,
    eps,
    tokens,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
    NUM_SQUARES: tl.constexpr,
    SQUARES_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
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
    wait_for_previous(OVERLAP)
    # What the end needs is asked for now.
    if x_squares is not None:
        part = tl.arange(0, SQUARES_BLOCK)[None, :]
        there = (token < tokens)[:, None] & (part < NUM_SQUARES)
        parts = tl.load(x_squares + token[:, None] * NUM_SQUARES + part, mask=there, other=0.0)
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

    let_next_begin(OVERLAP)
    result = tl.sum(acc, axis=0)
    up = tl.sum(acc_up, axis=0)
    if x_squares is not None:
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
        square = squares + token * tl.num_programs(0) + tl.program_id(0)
        tl.store(square, tl.sum(result * result, axis=1), mask=token < tokens)
