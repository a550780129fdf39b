"""Linear layers for tens to hundreds of tokens that end in a residual addition and an RMS norm.

The output and the down projection have few features, so their inner dimension is divided as well
(split-K), or most SMs would idle. The parts stay apart, in float32: the norm, which reads every row
anyway, adds them up. A library has to join them itself, which takes another launch.

Floor: read M K elements of weight. On an H200 (bf16, Qwen3-0.6B; us with the norm, then cuBLAS with
the norm), output projection, 16 to 256 tokens: 6.4 to 7.7 (7.9 to 8.7); down projection 6.9 to 9.0
(10.0 to 10.7).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import norm, tiling
from nanovllm.kernels.dependent_launch import let_next_begin, wait_for_previous
from nanovllm.kernels.device import usable_sms
from nanovllm.kernels.small_gemm import MAX_ROWS as _FEW_ROWS

_MAX_ROWS = 256
_MOST_PARTS, _FEWEST_PARTS = 4, 2
_MULTIPLES = tiling.FEATURES, _MOST_PARTS * tiling.LONG_STEP


def supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether ``linear_add_norm`` takes these and is fast for them."""
    return bias is None and x.shape[0] <= _MAX_ROWS and tiling.is_faster_for(weight, *_MULTIPLES)


def row_counts(weight: Tensor) -> list[int]:
    """A number of rows for every division of a layer with this weight; none if it is too large."""
    divisions: dict[tuple[int, tiling.Tiling], int] = {}
    if tiling.is_faster_for(weight, *_MULTIPLES):
        num_sms = usable_sms(weight.device)
        for rows in range(_FEW_ROWS + 1, _MAX_ROWS + 1):
            divisions.setdefault(_division(rows, weight.shape[0], num_sms), rows)
    return list(divisions.values())


def linear_add_norm(
    x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``s = x @ weight.T + residual; return rms_norm(s), s``; see ``reference.linear_add_norm``.

    Raises:
        ValueError: for a weight whose rows are no multiple of 64, or columns none of 512.
    """
    return norm.add_parts_rms_norm(linear_parts(x, weight), residual, norm_weight, eps)


def linear_parts(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 ``[P, N, M]`` whose sum over P is ``x @ weight.T`` of ``[N, K]`` and ``[M, K]``."""
    tiling.check(weight, *_MULTIPLES)
    (rows, inner), features = x.shape, weight.shape[0]
    num_parts, tile = _division(rows, features, usable_sms(x.device))
    parts = torch.empty(num_parts, rows, features, dtype=torch.float32, device=x.device)
    if rows > 0:
        grid = triton.cdiv(rows, tile.tokens), features // tiling.FEATURES, num_parts
        _parts_kernel[grid](
            *tiling.operands(x, weight, tile),
            parts,
            rows,
            OUT=features,
            PART=inner // num_parts,
            **tiling.options(tile),
        )
    return parts


def _division(rows: int, features: int, num_sms: int) -> tuple[int, tiling.Tiling]:
    """Parts of the inner dimension, and tiles: four parts while each SM has one program, or two."""
    tiles = features // tiling.FEATURES
    tile = tiling.choose(rows, tiles * _MOST_PARTS, num_sms)
    if tile.block == tiling.LONG_STEP:
        return _MOST_PARTS, tile
    return _FEWEST_PARTS, tiling.choose(rows, tiles * _FEWEST_PARTS, num_sms)


@triton.jit(do_not_specialize=["tokens"])
def _parts_kernel(
    x,
    weight,
    parts,
    tokens,
    OUT: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start, row, part = tl.program_id(0) * TOKENS, tl.program_id(1) * FEATURES, tl.program_id(2)
    wait_for_previous(OVERLAP)
    acc = tl.zeros([FEATURES, TOKENS], tl.float32)
    for step in range(0, PART, BLOCK):
        inner = part * PART + step
        acc = tl.dot(weight.load([row, inner]), tl.trans(x.load([start, inner])), acc)
    let_next_begin(OVERLAP)
    token = (start + tl.arange(0, TOKENS))[:, None]
    place = parts + (part * tokens + token) * OUT + row + tl.arange(0, FEATURES)[None, :]
    tl.store(place, tl.trans(acc), mask=token < tokens)
