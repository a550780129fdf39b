"""Prefill alone: prompts of random tokens, read in one step, against what the device can multiply.

    result = run_prefill(engine, requests=8, tokens=2048)
    peak = measure_matmul_peak(device, torch.bfloat16)
    record = describe_run(started, "prefill") | prefill_record(result, peak)

A time is wall time, from the first request's arrival to the last one's token on the host. Flops are
those that the model needs, a multiplication and an addition each: attention counts the pairs that
the causal mask leaves, and the output head the last token of each prompt.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nanovllm.bench import BenchError
from nanovllm.bench.report import format_title
from nanovllm.bench.timing import steady_seconds
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.models.qwen3_config import Qwen3Config
from nanovllm.sampling_params import SamplingParams

# The first compiles kernels, the second finds the libraries' pools filled.
WARM_UPS = 2
# Edges of the square matrices whose product gives the peak, by device.
PEAK_SIZES = {"cuda": (4096, 6144, 8192), "cpu": (256, 512)}
PEAK_SECONDS = {"cuda": 0.5, "cpu": 0.1}


@dataclass(frozen=True)
class PrefillResult:
    """Seconds of each repeat of one prefill step, and the flops of the step.

    Attributes:
        requests: prompts in the step.
        tokens: of each prompt.
        seconds: wall time of each repeat.
        flops: that a step needs.
    """

    requests: int
    tokens: int
    seconds: list[float]
    flops: int

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


def run_prefill(engine: LLMEngine, requests: int, tokens: int, repeats: int = 5) -> PrefillResult:
    """Prefills `requests` prompts of `tokens` tokens in one step; `repeats` times, after a warm-up.

    Args:
        engine: idle, without prefix caching.

    Raises:
        BenchError: the engine caches prefixes, or cannot read all prompts in one step.
    """
    if engine.config.enable_prefix_caching:
        raise BenchError(
            "enable_prefix_caching=True is not allowed: what is cached would not be prefilled"
        )
    config = engine.model_runner.model_config
    rng = np.random.default_rng()
    seconds = []
    for _ in tqdm(range(WARM_UPS + repeats), "Prefilling", unit="step"):
        prompts = rng.integers(0, config.vocab_size, (requests, tokens)).tolist()
        seconds.append(time_step(engine, prompts))
    flops = prefill_flops(config, [tokens] * requests)
    return PrefillResult(requests, tokens, seconds[WARM_UPS:], flops)


def time_step(engine: LLMEngine, prompts: list[list[int]]) -> float:
    """Seconds in which the engine takes the prompts, reads them and draws a token for each."""
    # With one token to draw, no request reaches decode.
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=1)
    start = time.perf_counter()
    try:
        for prompt in prompts:
            engine.add_request(prompt, params)
    except ValueError as error:
        raise BenchError(str(error)) from error
    outputs = engine.step()
    seconds = time.perf_counter() - start
    if len(outputs) < len(prompts):
        while not engine.is_finished():
            engine.step()
        raise BenchError(
            f"{len(prompts)} prompts of {len(prompts[0])} tokens do not fit into one step: it has "
            f"at most max_num_seqs={engine.config.max_num_seqs} prompts and max_num_batched_tokens="
            f"{engine.config.max_num_batched_tokens} tokens, and all KV blocks together hold "
            f"{engine.model_runner.capacity}"
        )
    return seconds


def prefill_flops(config: Qwen3Config, lengths: Sequence[int]) -> int:
    """Flops of prefilling prompts of these lengths, a token drawn after each."""
    q_width = config.num_attention_heads * config.head_dim
    pairs = sum(length * (length + 1) // 2 for length in lengths)  # of a query and a key
    dense = 2 * layer_weights(config) * sum(lengths)
    attention = 4 * q_width * pairs
    head = 2 * config.vocab_size * config.hidden_size * len(lengths)
    return config.num_hidden_layers * (dense + attention) + head


def layer_weights(config: Qwen3Config) -> int:
    """Elements of the matrices of one layer."""
    return sum(rows * columns for rows, columns in layer_matrices(config))


def layer_matrices(config: Qwen3Config) -> list[tuple[int, int]]:
    """Outputs and inputs of a layer's dense products: QKV, output, gate with up, and down."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    return [(q_width + 2 * kv_width, hidden), (hidden, q_width), (2 * inner, hidden),
            (hidden, inner)]  # fmt: skip


@torch.inference_mode()
def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of the fastest of some large square products of random matrices."""
    return max(matmul_rate(size, device, dtype) for size in PEAK_SIZES[device.type])


def matmul_rate(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Flops per second of [size, size] x [size, size] in steady state."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    call_seconds = steady_seconds(
        lambda: torch.mm(left, right, out=out), device, PEAK_SECONDS[device.type]
    )
    return 2 * size**3 / call_seconds


def prefill_record(result: PrefillResult, matmul_peak: float) -> dict[str, Any]:
    """The JSON fields of a prefill.

    Args:
        result: of `run_prefill`.
        matmul_peak: of `measure_matmul_peak`, in flops per second.
    """
    seconds = result.median_seconds
    rate = result.flops / seconds
    return {
        "requests": result.requests,
        "tokens": result.tokens,
        "repeats": len(result.seconds),
        "seconds": {"median": seconds, "min": min(result.seconds), "max": max(result.seconds)},
        "tokens_per_second": result.requests * result.tokens / seconds,
        "flops": result.flops,
        "flops_per_second": rate,
        "matmul_peak": matmul_peak,
        "peak_share": rate / matmul_peak,
    }


def format_prefill(record: dict[str, Any]) -> str:
    """A prefill in a few lines."""
    seconds = record["seconds"]
    return "\n".join(
        [
            format_title(record),
            f"{record['requests']} prompts of {record['tokens']:,} tokens in one step: "
            f"{seconds['median'] * 1e3:.1f} ms, median of {record['repeats']} "
            f"({seconds['min'] * 1e3:.1f} to {seconds['max'] * 1e3:.1f})",
            f"{record['tokens_per_second']:,.0f} tokens per second",
            f"{record['flops_per_second'] / 1e12:.3g} TFLOP/s, {record['peak_share']:.1%} of a "
            f"large matrix product ({record['matmul_peak'] / 1e12:.3g} TFLOP/s)",
        ]
    )
