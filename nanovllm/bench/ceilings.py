"""What a device can do at best, and what a step needs: bytes for decode, flops for prefill.

No decode step can take less than its bytes over the bandwidth of a large copy, measured on the
same device in the same run: every step reads all weights once and the KV cache of all sequences.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from nanovllm.bench.turns import DecodeWorkload
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.models import ModelConfig

# The first calls of all may compile kernels.
FIRST_CALLS, FEWEST_CALLS, MOST_CALLS = 3, 6, 5000
# Many times any L2 cache, and small enough for the memory that an engine leaves free.
COPY_BYTES = 1 << 29
COPY_SECONDS = 0.01
# Edges of the square matrices whose product gives the peak, by device.
PEAK_SIZES = {"cuda": (4096, 6144, 8192), "cpu": (256, 512)}
PEAK_SECONDS = {"cuda": 0.5, "cpu": 0.1}


def steady_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median seconds of a call among as many in a row as take `seconds`, so that no device idles.

    `call` issues its work on the current stream of `device`. The first third of the calls does not
    count: clocks and power settle meanwhile.
    """
    once = median(time_calls(call, device, FIRST_CALLS))
    count = min(max(math.ceil(seconds / max(once, 1e-9)), FEWEST_CALLS), MOST_CALLS)
    return median(time_calls(call, device, count)[count // 3 :])


def time_calls(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds from the end of each call's work to the end of the next one's, `count` of them."""
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(count):
            call()
            moments.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairwise(events)]


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(COPY_BYTES // 4, device=device).normal_()
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / steady_seconds(lambda: target.copy_(source), device, COPY_SECONDS)


@torch.inference_mode()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of the fastest of some large square products of random matrices."""

    def rate(size: int) -> float:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        seconds = PEAK_SECONDS[device.type]
        return 2 * size**3 / steady_seconds(lambda: torch.mm(left, right, out=out), device, seconds)

    return max(map(rate, PEAK_SIZES[device.type]))


def decode_floor(runner: ModelRunner, workload: DecodeWorkload, bandwidth: float) -> dict[str, Any]:
    """The least time of the average step of a turn, on each of the ranks, and why."""
    weights = weight_bytes(runner)
    kv = workload.batch * workload.mean_context * kv_bytes_per_token(runner)
    return {
        "weight_bytes": weights,
        "kv_bytes": kv,
        "copy_bandwidth": bandwidth,
        "step_ms": (weights + kv) / bandwidth * 1e3,
    }


def weight_bytes(runner: ModelRunner) -> int:
    """Bytes of weights that a step reads: of an embedding that is no output head, hardly any."""
    weights = list(runner.model.parameters())
    config, ranks = runner.model_config, runner.config.tensor_parallel_size
    embedding = config.vocab_size * config.hidden_size * weights[0].itemsize // ranks
    return sum(w.nbytes for w in weights) - (0 if config.tie_word_embeddings else embedding)


def kv_bytes_per_token(runner: ModelRunner) -> int:
    """Bytes of keys and values of one token, over all layers of a rank."""
    return runner.model.kv_cache[:, :, 0, :, 0].nbytes


def layer_matrices(config: ModelConfig) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's dense products: QKV, output, gate with up, and down."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    return [(q_width + 2 * kv_width, hidden), (hidden, q_width), (2 * inner, hidden),
            (hidden, inner)]  # fmt: skip


def layer_weights(config: ModelConfig) -> int:
    """Elements of the matrices of one layer."""
    return sum(rows * columns for rows, columns in layer_matrices(config))


def prefill_flops(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Flops of prefilling prompts of these lengths, a token drawn after each.

    A multiplication and an addition each; attention counts the pairs that the causal mask leaves.
    """
    q_width = config.num_attention_heads * config.head_dim
    pairs = sum(length * (length + 1) // 2 for length in lengths)  # of a query and a key
    dense = 2 * layer_weights(config) * sum(lengths)
    head = 2 * config.vocab_size * config.hidden_size * len(lengths)
    return config.num_hidden_layers * (dense + 4 * q_width * pairs) + head
