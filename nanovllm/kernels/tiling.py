"""Tiles of the linear layers for tens to hundreds of tokens (``paired_gemm``, ``split_gemm``).

These layers are small: their weights take a few microseconds to read, and what counts is that every
SM reads a part, and that as few launches as possible surround it. So a tile has 64 features, a
weight is the left operand of the tensor cores (which want 64 rows of it, but take 16 tokens on the
right), and there are as many tiles of tokens as give every SM a program, and no more.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.dependent_launch import launch_options
from nanovllm.kernels.device import has_large_tiles

FEATURES = 64  # rows of weight in a tile
LONG_STEP, SHORT_STEP = 128, 64  # inner elements
# Larger weights are left to cuBLAS. On an H200 gate and up with SiLU, for 128 tokens, take 65 us
# instead of its 58 at Qwen3-8B shape (192 MiB), but 7.4 instead of 8.2 at 0.6B (12 MiB).
MAX_WEIGHT_BYTES = 16 * 2**20
_TOKENS = (16, 32, 64)
_NUM_WARPS = 4
_NUM_STAGES = 4


class Tiling(NamedTuple):
    """Tokens of a tile, inner elements of a step."""

    tokens: int
    block: int


def choose(rows: int, feature_tiles: int, num_sms: int) -> Tiling:
    """The smallest tiles of tokens with which ``feature_tiles`` of each give an SM one program."""
    for tokens in _TOKENS:
        if triton.cdiv(rows, tokens) * feature_tiles <= num_sms:
            # One program has an SM to itself, and with it room for long steps.
            return Tiling(tokens, LONG_STEP)
    return Tiling(_TOKENS[-1], SHORT_STEP)


def is_faster_for(weight: Tensor, feature_multiple: int, inner_multiple: int) -> bool:
    """Whether a layer of this weight ``[M, K]`` can be multiplied here, and faster than by cuBLAS.

    Args:
        weight: the weight.
        feature_multiple, inner_multiple: of what M and K must be multiples.
    """
    features, inner = weight.shape
    return (
        weight.element_size() == 2
        and features % feature_multiple == 0
        and inner % inner_multiple == 0
        and weight.numel() * weight.element_size() < MAX_WEIGHT_BYTES
        and has_large_tiles(weight.device)
    )


def check(weight: Tensor, feature_multiple: int, inner_multiple: int) -> None:
    """Raises ValueError for a weight whose sizes are not such multiples."""
    for name, size, multiple in zip(
        ("rows", "columns"), weight.shape, (feature_multiple, inner_multiple), strict=True
    ):
        if size % multiple:
            raise ValueError(f"weight has {size} {name}; they must be a multiple of {multiple}")


def operands(x: Tensor, weight: Tensor, tile: Tiling) -> tuple[TensorDescriptor, TensorDescriptor]:
    """``x [N, K]`` and ``weight [M, K]`` for bulk copies of tiles; beyond their ends are zeros.

    Both must begin at a multiple of 16 bytes.
    """
    return _describe(x, tile.tokens, tile.block), _describe(weight, FEATURES, tile.block)


def options(tile: Tiling) -> dict[str, Any]:
    """Constants and compiler options that the kernels have in common."""
    return {
        "TOKENS": tile.tokens,
        "FEATURES": FEATURES,
        "BLOCK": tile.block,
        "num_warps": _NUM_WARPS,
        "num_stages": _NUM_STAGES,
        **launch_options(),
    }


def _describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix.contiguous(), [rows, columns])
