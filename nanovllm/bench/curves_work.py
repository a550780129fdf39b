"""The work whose rate the curves show: decode attention, a plain read, and dense products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.bench.prefill import layer_matrices, layer_weights
from nanovllm.kernels.gpu import can_limit_cublas_sms, cublas_sm_limit
from nanovllm.models.qwen3_config import Qwen3Config

BLOCK_SIZE = 256
READ_BYTES = 1 << 29
# Weights of at least this size are used in turn, so that no L2 cache holds them.
WEIGHT_BYTES = 1 << 29


class Work(ABC):
    """Something to be timed on so many SMs.

    Args:
        name: what it is called in the record.
        amount: bytes or flops of issuing it once.
    """

    def __init__(self, name: str, amount: int) -> None:
        self.name = name
        self.amount = amount

    @abstractmethod
    def prepare(self, num_sms: int) -> Callable[[], object]:
        """A function that issues it once on the current stream, which has `num_sms` SMs."""


class AttentionWork(Work):
    """Paged decode attention over random keys and values; `amount` is their bytes.

    Args:
        config: the model, whose heads are taken.
        sequences: of one new token each.
        context: tokens of each.
        device: where.
        dtype: of the KV cache.
    """

    def __init__(
        self,
        config: Qwen3Config,
        sequences: int,
        context: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        q_heads, kv_heads, head_dim = self.heads
        token_bytes = 2 * kv_heads * head_dim * dtype.itemsize
        super().__init__("attention", sequences * context * token_bytes)
        blocks = -(-context // BLOCK_SIZE)
        shape = (sequences * blocks, kv_heads, BLOCK_SIZE, head_dim)
        self.keys, self.values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        self.query = torch.randn(sequences, q_heads, head_dim, dtype=dtype, device=device)
        # In any order, as after many requests have come and gone.
        order = torch.randperm(sequences * blocks, device=device)
        self.tables = order.to(torch.int32).view(sequences, blocks)
        self.lengths = np.full(sequences, context, np.int32)

    def prepare(self, num_sms: int) -> Callable[[], torch.Tensor]:
        # Here, because a machine without a GPU need not have Triton.
        from nanovllm.kernels.paged_decode import (
            DecodeWorkspace,
            paged_decode_attention,
            tile_offsets,
        )

        device = self.query.device
        lengths = torch.from_numpy(self.lengths).to(device)
        offsets = torch.from_numpy(tile_offsets(self.lengths)).to(device)
        workspace = DecodeWorkspace(num_sms, *self.heads, device)
        scale = self.query.shape[2] ** -0.5
        return lambda: paged_decode_attention(
            self.query, self.keys, self.values, self.tables, lengths, scale, offsets, workspace
        )


class ReadWork(Work):
    """Reading random numbers and nothing else; `amount` is their bytes."""

    def __init__(self, device: torch.device, num_bytes: int = READ_BYTES) -> None:
        super().__init__("read", num_bytes)
        self.source = torch.randn(num_bytes // 4, device=device)

    def prepare(self, num_sms: int) -> Callable[[], torch.Tensor]:
        from nanovllm.bench.read_kernel import PROGRAMS_PER_SM, read_all

        sums = self.source.new_zeros(num_sms * PROGRAMS_PER_SM)
        return lambda: read_all(self.source, sums, num_sms)


class DenseWork(Work):
    """The dense products of several layers, as a pipeline's FFN lane issues them.

    `amount` is their flops.

    Args:
        tokens: rows of every product.
        layers: weights of each layer, [outputs, inputs]; different works may share them.
        device_sms: SMs of the whole device.
    """

    def __init__(
        self, tokens: int, layers: Sequence[Sequence[torch.Tensor]], device_sms: int
    ) -> None:
        weights = [weight for layer in layers for weight in layer]
        super().__init__(str(tokens), 2 * tokens * sum(weight.numel() for weight in weights))
        widths = {weight.shape[1] for weight in weights}
        self.weights = weights
        self.device_sms = device_sms
        self.inputs = {width: weights[0].new_empty(tokens, width).normal_() for width in widths}

    def prepare(self, num_sms: int) -> Callable[[], None]:
        return partial(self._multiply, num_sms)

    def _multiply(self, num_sms: int) -> None:
        with cublas_sm_limit(num_sms, self.device_sms):
            for weight in self.weights:
                F.linear(self.inputs[weight.shape[1]], weight)


def dense_library() -> str:
    """What multiplies on a partition; on the whole device it is torch's default."""
    return "cuBLASLt told its SMs" if can_limit_cublas_sms() else "cuBLAS"


def random_layers(
    config: Qwen3Config, device: torch.device, num_bytes: int = WEIGHT_BYTES
) -> list[list[torch.Tensor]]:
    """Random bfloat16 weights of as many layers as fill `num_bytes`, at least two."""
    count = max(2, math.ceil(num_bytes / (2 * layer_weights(config))))
    return [
        [torch.randn(size, dtype=torch.bfloat16, device=device) for size in layer_matrices(config)]
        for _ in range(count)
    ]
