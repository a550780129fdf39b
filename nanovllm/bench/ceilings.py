"""What a GPU can do at best, and what a step needs: bytes for decode, flops for prefill.

No decode step can take less than its bytes over the bandwidth of a large copy, measured on the
same device in the same run: every step reads all weights once and the KV cache of all sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median

import torch

from nanovllm.bench.report import Record
from nanovllm.bench.turns import DecodeWorkload
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.models import ModelConfig

# The first calls of all may compile kernels.
FIRST_CALLS, FEWEST_CALLS, MOST_CALLS = 3, 6, 5000
# Many times any L2 cache, and small enough for the memory that an engine leaves free.
COPY_BYTES = 1 << 29
COPY_SECONDS = 0.01
# Edges of the square matrices whose product gives the peak.
PEAK_SIZES = (4096, 6144, 8192)
PEAK_SECONDS = 0.5


def steady_seconds(call: Callable[[], object], seconds: float) -> float:
    """Median seconds of a call among as many in a row as take `seconds`, so that no GPU idles.

    `call` issues its work on the current stream. The first third of the calls does not count:
    clocks and power settle meanwhile.
    """
    once = median(time_calls(call, FIRST_CALLS))
    count = min(max(math.ceil(seconds / once), FEWEST_CALLS), MOST_CALLS)
    return median(time_calls(call, count)[count // 3 :])


def time_calls(call: Callable[[], object], count: int) -> list[float]:
    """Seconds from the end of each call's work to the end of the next one's, `count` of them."""
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
    return 2 * COPY_BYTES / steady_seconds(lambda: target.copy_(source), COPY_SECONDS)


@torch.inference_mode()
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of the fastest of some large square products of random matrices."""

    def rate(size: int) -> float:
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(left)
        return 2 * size**3 / steady_seconds(lambda: torch.mm(left, right, out=out), PEAK_SECONDS)

    return max(map(rate, PEAK_SIZES))


def decode_floor(runner: ModelRunner, workload: DecodeWorkload, bandwidth: float) -> Record:
    """The least time of the average step of a turn, on each of the ranks, and why."""
    weights = weight_bytes(runner)
    per_token = runner.model.kv_cache[:, :, 0, :, 0].nbytes  # over all layers
    kv = workload.batch * workload.mean_context * per_token
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


def prefill_flops(config: ModelConfig, lengths: Sequence[int]) -> int:
    """Flops of prefilling prompts of these lengths, a token drawn after each.

    A multiplication and an addition each; attention counts the pairs that the causal mask leaves.
    """
    embedding = config.vocab_size * config.hidden_size
    in_layers = config.num_weights - embedding * (1 if config.tie_word_embeddings else 2)
    pairs = sum(length * (length + 1) // 2 for length in lengths)  # of a query and a key
    attention = 4 * config.num_attention_heads * config.head_dim * pairs
    dense = 2 * (in_layers * sum(lengths) + embedding * len(lengths))
    return dense + config.num_hidden_layers * attention
