"""Tiles of the linear layers for tens to hundreds of tokens (``paired_gemm``, ``split_gemm``).

These layers are small: their weights take a few microseconds to read, and what counts is that every
SM reads a part, and that as few launches as possible surround it. So a tile has 64 features, a
weight is the left operand of the tensor cores (which want 64 rows of it, but take 16 tokens on the
right), and there are as many tiles of tokens as give every SM a program, and no more.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FEATURES = 64  # rows of weight in a tile
NUM_WARPS = 4
NUM_STAGES = 4
# From here on a product is bound by arithmetic, and cuBLAS's larger tiles win: on an H200 gate and
# up with SiLU, for 128 tokens, take 65 us instead of 58 at Qwen3-8B shape (192 MiB), but 7.3
# instead of 8.2 at 0.6B (12 MiB).
MAX_WEIGHT_BYTES = 16 * 2**20
LONG_STEP, SHORT_STEP = 128, 64  # inner elements
_TOKENS = (16, 32, 64)


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


def is_small(weight: Tensor) -> bool:
    """Whether a layer of this weight is better multiplied here than by cuBLAS."""
    fits = weight.shape[0] % FEATURES == 0 and weight.element_size() == 2
    return fits and weight.numel() * weight.element_size() < MAX_WEIGHT_BYTES


@cache
def sm_count(device: torch.device) -> int:
    """SMs of the device; for the interpreter, those of an H200."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def describe(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """For bulk copies of ``rows x columns`` tiles of a row-major matrix; zeros beyond its end."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])
