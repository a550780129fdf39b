"""Linear layers for a handful of tokens, where reading the weights is all that takes time.

One program computes a few output features of all tokens. It reads its rows of the weight once,
from end to end; its warps divide the inner dimension among them and add up their sums at the end.
That keeps every SM loading even when there are only a thousand features. Two neighbours can be
part of the same launch, because each program sees whole rows of the input:

- before, the residual addition and RMS norm (``add_norm_*``). A norm divides a row by one number,
  so the product is computed without it and divided at the end;
- after, ``silu(gate) * up``: a program computes the same features of both halves (``*_silu_mul``).

Products are added up in float32 and rounded once. Floor: read M K elements of weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import pdl

MAX_TOKENS = 16
_WARPS = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for ``x [N, K]``, N up to MAX_TOKENS, and ``weight [M, K]``."""
    return _launch(x, weight, bias, None, False)[0]


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` for ``weight [2I, K]``, whose first half is the gate."""
    return _launch(x, weight, None, None, True)[0]


def add_norm_linear(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear(rms_norm(x + residual), weight, bias), x + residual``."""
    return _launch(x, weight, bias, (residual, norm_weight, eps), False)


def add_norm_linear_silu_mul(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``linear_silu_mul(rms_norm(x + residual), weight), x + residual``."""
    return _launch(x, weight, None, (residual, norm_weight, eps), True)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    (tokens, inner), features = x.shape, weight.shape[0] // (2 if gated else 1)
    if tokens > MAX_TOKENS:
        raise ValueError(f"x has {tokens} rows; at most {MAX_TOKENS} are allowed")
    rows, block, stages, min_tokens = _tiling(features, inner, gated)
    if inner % (_WARPS * block):
        raise ValueError(f"x has {inner} columns; they must be a multiple of {_WARPS * block}")
    x = x.contiguous()
    residual, norm_weight, eps = norm or (None, None, 0.0)
    out = torch.empty(tokens, features, dtype=x.dtype, device=x.device)
    total = torch.empty_like(x) if norm else None
    if tokens > 0:
        _linear_kernel[(triton.cdiv(features, rows),)](
            x,
            residual.contiguous() if residual is not None else None,
            norm_weight,
            weight,
            bias,
            out,
            total,
            eps,
            tokens,
            FEATURES=features,
            INNER=inner,
            TOKENS=max(triton.next_power_of_2(tokens), min_tokens),
            ROWS=rows,
            SPLIT=_WARPS,
            BLOCK=block,
            GATED=gated,
            LINES=triton.next_power_of_2(rows * inner * weight.element_size() // 128),
            num_warps=_WARPS,
            num_stages=stages,
            **pdl.options(x),
        )
    return out, x if total is None else total


def _tiling(features: int, inner: int, gated: bool) -> tuple[int, int, int, int]:
    """Features of a program, inner elements of a warp's step, steps in flight, least tokens."""
    block = 64
    while inner % (_WARPS * block) and block > 16:
        block //= 2
    # Two programs an SM at least, as long as a program keeps 8 features.
    rows = 8 if features <= 2048 or gated else 16
    return rows, block, min(inner // (_WARPS * block) + 1, 6), 16


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x,
    residual,
    norm_weight,
    weight,
    bias,
    out,
    total,
    eps,
    tokens,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    first = tl.program_id(0) * ROWS
    if PDL:
        _prefetch(weight + first.to(tl.int64) * INNER, FEATURES - first, INNER, ROWS, LINES)
        if GATED:
            up_rows = weight + (first + FEATURES).to(tl.int64) * INNER
            _prefetch(up_rows, FEATURES - first, INNER, ROWS, LINES)
    pdl.wait_for_inputs(PDL)

    # Tensors are [SPLIT, tokens or features, BLOCK]; a step takes SPLIT * BLOCK inner elements.
    token = tl.arange(0, TOKENS)
    feature = first + tl.arange(0, ROWS)
    inner = (tl.arange(0, SPLIT)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])[:, None, :]
    exists = (token < tokens)[None, :, None]
    kept = (token < tl.where(first == 0, tokens, 0))[None, :, None]  # by one program
    x_place = token[None, :, None] * INNER + inner
    row = tl.minimum(feature, FEATURES - 1).to(tl.int64)[None, :, None]
    w_place = row * INNER + inner

    acc = tl.zeros([SPLIT, TOKENS, ROWS], tl.float32)
    acc_up = tl.zeros([SPLIT, TOKENS, ROWS], tl.float32)
    squares = tl.zeros([SPLIT, TOKENS, BLOCK], tl.float32)
    for start in range(0, INNER, SPLIT * BLOCK):
        values = tl.load(x + x_place + start, mask=exists, other=0.0)
        if residual is not None:
            added = tl.load(residual + x_place + start, mask=exists, other=0.0)
            # Rounded to the dtype before it is normalised, as without the fusion.
            summed = (values.to(tl.float32) + added.to(tl.float32)).to(values.dtype)
            tl.store(total + x_place + start, summed, mask=kept)
            scale = tl.load(norm_weight + inner + start).to(tl.float32)
            wide = summed.to(tl.float32)
            squares += wide * wide
            values = (wide * scale).to(values.dtype)
        w = tl.load(weight + w_place + start)
        acc = tl.dot(values, tl.trans(w, (0, 2, 1)), acc, input_precision="ieee")
        if GATED:
            w_up = tl.load(weight + FEATURES * INNER + w_place + start)
            acc_up = tl.dot(values, tl.trans(w_up, (0, 2, 1)), acc_up, input_precision="ieee")

    result = tl.sum(acc, axis=0)
    result_up = tl.sum(acc_up, axis=0)
    if residual is not None:
        mean = tl.sum(tl.sum(squares, axis=2), axis=0) / INNER
        inverse = tl.rsqrt(mean + eps)[:, None]
        result = result * inverse
        result_up = result_up * inverse
    if GATED:
        result = result * tl.sigmoid(result) * result_up
    if bias is not None:
        result += tl.load(bias + feature, mask=feature < FEATURES, other=0.0).to(tl.float32)[
            None, :
        ]
    place = out + token[:, None] * FEATURES + feature[None, :]
    wanted = (token < tokens)[:, None] & (feature < FEATURES)[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _prefetch(rows, existing, INNER: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr):
    """Bring rows of a weight into L2, while the kernel before computes the input."""
    last = tl.minimum(existing, ROWS) * INNER - 1
    place = rows + tl.minimum(tl.arange(0, LINES) * (ROWS * INNER // LINES), last)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [place.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
