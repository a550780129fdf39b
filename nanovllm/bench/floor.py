"""The time below which no decode step can be: the bytes it must read, over the copy bandwidth.

Every step reads all weights once and the KV cache of all its sequences. The bandwidth is that of
a large copy on the same device, measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from nanovllm.bench.workload import DecodeWorkload
from nanovllm.models.qwen3 import Qwen3ForCausalLM

# Many times any L2 cache, and small enough for the memory that an engine leaves free.
COPY_BYTES = 1 << 29
COPIES = 30


@dataclass(frozen=True)
class Floor:
    """Bytes that a step reads, and bytes per second that the device can copy."""

    weight_bytes: int
    kv_bytes: float
    copy_bandwidth: float

    @classmethod
    def of(cls, model: Qwen3ForCausalLM, workload: DecodeWorkload, copy_bandwidth: float) -> Floor:
        """Floor of the average step of a turn."""
        tokens = workload.batch * workload.mean_context
        return cls(weight_bytes(model), tokens * kv_bytes_per_token(model), copy_bandwidth)

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes

    @property
    def seconds(self) -> float:
        return self.total_bytes / self.copy_bandwidth


def weight_bytes(model: Qwen3ForCausalLM) -> int:
    """Bytes of weights that a step reads: of an embedding that is no output head, hardly any."""
    total = sum(weight.nbytes for weight in model.parameters())
    return total - (model.model.embed_tokens.weight.nbytes if model.lm_head is not None else 0)


def kv_bytes_per_token(model: Qwen3ForCausalLM) -> int:
    """Bytes of keys and values of one token, over all layers."""
    total = 0
    for layer in model.model.layers:
        for cache in (layer.self_attn.k_cache, layer.self_attn.v_cache):
            _, heads, _, head_dim = cache.shape
            total += heads * head_dim * cache.element_size()
    return total


def measure_copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy on a CUDA device."""
    source = torch.empty(COPY_BYTES // 4, device=device).normal_()
    target = torch.empty_like(source)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(COPIES + 1)]
    marks[0].record()
    for mark in marks[1:]:
        target.copy_(source)
        mark.record()
    marks[-1].synchronize()
    times = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return 2 * COPY_BYTES / (median(times) * 1e-3)
