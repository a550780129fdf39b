"""The work whose rate the curves show: decode attention, a plain read, and dense products.

Each is a name in the record, an amount of bytes or flops, and a function that, for a number of SMs,
gives a function which issues it once on the current stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nanovllm.bench.ceilings import layer_matrices, layer_weights
from nanovllm.kernels.gpu import can_limit_cublas_sms, cublas_sm_limit
from nanovllm.kernels.paged_decode import DecodeWorkspace, paged_decode_attention, tile_offsets
from nanovllm.models import ModelConfig

BLOCK_SIZE = 256
READ_BYTES = 1 << 29
# Weights of at least this size are used in turn, so that no L2 cache holds them.
WEIGHT_BYTES = 1 << 29
# Of the reading kernel; on each SM 8 programs that have 16 KiB under way.
PROGRAMS_PER_SM, TILE = 8, 4096


class Work(NamedTuple):
    """Something to be timed on so many SMs."""

    name: str
    amount: int
    prepare: Callable[[int], Callable[[], object]]


def attention_work(
    config: ModelConfig,
    sequences: int,
    context: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> Work:
    """Paged decode attention over random keys and values, whose bytes count."""
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q_heads, kv_heads, head_dim = heads
    blocks = -(-context // BLOCK_SIZE)
    shape = (sequences * blocks, kv_heads, BLOCK_SIZE, head_dim)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    query = torch.randn(sequences, q_heads, head_dim, dtype=dtype, device=device)
    # In any order, as after many requests have come and gone.
    order = torch.randperm(sequences * blocks, device=device)
    tables = order.to(torch.int32).view(sequences, blocks)
    counts = np.full(sequences, context, np.int32)
    lengths = torch.from_numpy(counts).to(device)
    offsets = torch.from_numpy(tile_offsets(counts)).to(device)

    def prepare(num_sms: int) -> Callable[[], torch.Tensor]:
        workspace = DecodeWorkspace(num_sms, *heads, device)
        return lambda: paged_decode_attention(
            query, keys, values, tables, lengths, head_dim**-0.5, offsets, workspace
        )

    return Work(
        "attention", sequences * context * 2 * kv_heads * head_dim * dtype.itemsize, prepare
    )


def read_work(device: torch.device, num_bytes: int = READ_BYTES) -> Work:
    """Reading random numbers and nothing else: what each program has read, added up.

    torch has none: its reductions have too few bytes under way per SM for a small partition.
    """
    source = torch.randn(num_bytes // 4, device=device)

    def prepare(num_sms: int) -> Callable[[], torch.Tensor]:
        sums = source.new_zeros(num_sms * PROGRAMS_PER_SM)

        def read() -> torch.Tensor:
            _read_kernel[(len(sums),)](source, sums, len(source) // TILE, TILE=TILE, num_warps=4)
            return sums

        return read

    return Work("read", num_bytes, prepare)


@triton.jit
def _read_kernel(source, sums, num_tiles, TILE: tl.constexpr):
    column = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        total += tl.load(source + tile * TILE + column)
    tl.store(sums + tl.program_id(0), tl.sum(total))


def dense_work(tokens: int, weights: Sequence[torch.Tensor], device_sms: int) -> Work:
    """Products of [tokens, inputs] and all `weights`, as a pipeline's FFN lane issues them."""
    widths = {weight.shape[1] for weight in weights}
    inputs = {width: weights[0].new_empty(tokens, width).normal_() for width in widths}

    def prepare(num_sms: int) -> Callable[[], None]:
        def multiply() -> None:
            with cublas_sm_limit(num_sms, device_sms):
                for weight in weights:
                    F.linear(inputs[weight.shape[1]], weight)

        return multiply

    return Work(str(tokens), 2 * tokens * sum(weight.numel() for weight in weights), prepare)


def dense_library() -> str:
    """What multiplies on a partition; on the whole device it is torch's default."""
    return "cuBLASLt told its SMs" if can_limit_cublas_sms() else "cuBLAS"


def random_weights(
    config: ModelConfig, device: torch.device, num_bytes: int = WEIGHT_BYTES
) -> list[torch.Tensor]:
    """Random bfloat16 weights of as many layers as fill `num_bytes`, at least two."""
    layers = max(2, math.ceil(num_bytes / (2 * layer_weights(config))))
    sizes = layer_matrices(config) * layers
    return [torch.randn(size, dtype=torch.bfloat16, device=device) for size in sizes]
