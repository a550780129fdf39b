"""Linear layers for a handful of tokens, where reading the weights is all that takes time.

One program computes a few output features of all tokens. It reads its rows of the weight once,
from end to end; its warps divide the inner dimension among them and add up their sums at the end.
That keeps every SM loading even when there are only a thousand features. For the gated MLP a
program computes the same features of both halves and ends with ``silu(gate) * up``.

Products are added up in float32 and rounded once. Floor: read M K elements of weight.
On an H200 (bf16; QKV, output, gate and up with SiLU, down; us, then cuBLAS): Qwen3-0.6B, 1 token
4.4, 3.7, 5.6, 4.5 (4.9, 5.9, 7.7, 7.4), 8 tokens 4.7, 3.7, 6.1, 4.6 (5.3, 5.9, 7.5, 7.5);
Qwen3-8B, 1 token 15.6, 10.9, 52.9, 28.0 (16.1, 13.4, 51.7, 31.4).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 8
_WARPS = 4
_BLOCK = 64  # inner elements of a warp's step
_STAGES = 5


def supports(x: Tensor) -> bool:
    """Whether ``linear`` and ``linear_silu_mul`` take the input ``x [N, K]`` and are fast for it.

    In float32, products would not run on the tensor cores.
    """
    rows, inner = x.shape
    return rows <= MAX_ROWS and inner % (_WARPS * _BLOCK) == 0 and x.element_size() == 2


def row_counts() -> list[int]:
    """A number of rows for every form of the kernel, each of which is compiled on its own."""
    return [1 << power for power in range(MAX_ROWS.bit_length())]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` for ``x [N, K]``, N up to MAX_ROWS, and ``weight [M, K]``."""
    return _launch(x, weight, bias, weight.shape[0], gated=False)


def linear_silu_mul(x: Tensor, gate_up_weight: Tensor) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` for ``[2I, K]``, whose first half is the gate."""
    return _launch(x, gate_up_weight, None, gate_up_weight.shape[0] // 2, gated=True)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, features: int, gated: bool) -> Tensor:
    tokens, inner = x.shape
    if tokens > MAX_ROWS:
        raise ValueError(f"x has {tokens} rows; at most {MAX_ROWS} are allowed")
    step = _WARPS * _BLOCK
    if inner % step:
        raise ValueError(f"x has {inner} columns; they must be a multiple of {step}")
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(tokens, features, dtype=x.dtype, device=x.device)
    if tokens > 0:
        # Two programs an SM at least, as long as a program keeps 8 features.
        rows = 8 if features <= 2048 or gated else 16
        _linear_kernel[(triton.cdiv(features, rows),)](
            x,
            weight,
            bias,
            out,
            tokens,
            FEATURES=features,
            INNER=inner,
            TOKENS=triton.next_power_of_2(tokens),
            ROWS=rows,
            SPLIT=_WARPS,
            BLOCK=_BLOCK,
            GATED=gated,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x,
    weight,
    bias,
    out,
    tokens,
    FEATURES: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    GATED: tl.constexpr,
):
    # Tensors are [SPLIT, tokens or features, BLOCK]; a step takes SPLIT * BLOCK inner elements.
    token = tl.arange(0, TOKENS)
    feature = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inner = (tl.arange(0, SPLIT)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])[:, None, :]
    exists = (token < tokens)[None, :, None]
    x_place = token[None, :, None] * INNER + inner
    row = tl.minimum(feature, FEATURES - 1).to(tl.int64)[None, :, None]
    w_place = row * INNER + inner

    acc = tl.zeros([SPLIT, TOKENS, ROWS], tl.float32)
    acc_up = tl.zeros([SPLIT, TOKENS, ROWS], tl.float32)
    for start in range(0, INNER, SPLIT * BLOCK):
        values = tl.load(x + x_place + start, mask=exists, other=0.0)
        w = tl.load(weight + w_place + start)
        acc = tl.dot(values, tl.trans(w, (0, 2, 1)), acc, input_precision="ieee")
        if GATED:
            w_up = tl.load(weight + FEATURES * INNER + w_place + start)
            acc_up = tl.dot(values, tl.trans(w_up, (0, 2, 1)), acc_up, input_precision="ieee")

    result = tl.sum(acc, axis=0)
    if GATED:
        result = result * tl.sigmoid(result) * tl.sum(acc_up, axis=0)
    is_feature = feature < FEATURES
    if bias is not None:
        result += tl.load(bias + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    place = out + token[:, None] * FEATURES + feature[None, :]
    wanted = (token < tokens)[:, None] & is_feature[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=wanted)
