"""Prompts alone: random tokens, read in one step, against what the device can multiply.

A time is wall time, from the first request's arrival to the last one's token on the host.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from statistics import median

import numpy as np
from tqdm import tqdm

from nanovllm.bench import BenchError, report
from nanovllm.bench.ceilings import matmul_peak, prefill_flops
from nanovllm.bench.engines import room, start_engine
from nanovllm.bench.report import Record
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams

# The first compiles kernels, the second finds the libraries' pools filled.
WARM_UPS = 2
REPEATS = 5


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Measures prefill; yields the record once."""
    options = room(args, args.requests, args.tokens + 1)
    options["max_num_batched_tokens"] = args.requests * args.tokens
    options["enforce_eager"] = True  # graphs are for decode, which nothing reaches
    with start_engine(args, longest=args.tokens + 1, **options) as (engine, about):
        runner = engine.model_runner
        seconds = time_steps(engine, args.requests, args.tokens)
        record = report.describe_machine(args.device, "prefill") | about
        peak = matmul_peak(runner.device, next(iter(runner.model.parameters())).dtype)
        peak *= record["ranks"]
        flops = prefill_flops(runner.model_config, [args.tokens] * args.requests)
        middle = median(seconds)
        yield record | {
            "requests": args.requests,
            "tokens": args.tokens,
            "repeats": len(seconds),
            "seconds": {"median": middle, "min": min(seconds), "max": max(seconds)},
            "tokens_per_second": args.requests * args.tokens / middle,
            "flops": flops,
            "flops_per_second": flops / middle,
            "matmul_peak": peak,
            "peak_share": flops / middle / peak,
        }


def time_steps(engine: LLMEngine, requests: int, tokens: int) -> list[float]:
    """Seconds of each of `REPEATS` prefill steps of random prompts, after a warm-up."""
    rng = np.random.default_rng()
    vocab_size = engine.model_runner.model_config.vocab_size
    seconds = []
    for _ in tqdm(range(WARM_UPS + REPEATS), "Prefilling", unit="step"):
        prompts = rng.integers(0, vocab_size, (requests, tokens)).tolist()
        seconds.append(time_step(engine, prompts))
    return seconds[WARM_UPS:]


def time_step(engine: LLMEngine, prompts: list[list[int]]) -> float:
    """Seconds in which the engine takes the prompts, reads them and draws a token for each."""
    # With one token to draw, no request reaches decode.
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=1)
    start = time.perf_counter()
    for prompt in prompts:
        engine.add_request(prompt, params)
    outputs = engine.step()
    seconds = time.perf_counter() - start
    if len(outputs) < len(prompts):
        raise BenchError(
            f"--requests {len(prompts)} of --tokens {len(prompts[0])} do not fit into one step: "
            f"all KV blocks together hold {engine.model_runner.capacity} tokens"
        )
    return seconds


def describe(record: Record) -> str:
    """A prefill in a few lines."""
    seconds = record["seconds"]
    return "\n".join(
        [
            report.title(record),
            f"{record['requests']} prompts of {record['tokens']:,} tokens in one step: "
            f"{seconds['median'] * 1e3:.1f} ms, median of {record['repeats']} "
            f"({seconds['min'] * 1e3:.1f} to {seconds['max'] * 1e3:.1f})",
            f"{record['tokens_per_second']:,.0f} tokens per second",
            f"{record['flops_per_second'] / 1e12:.3g} TFLOP/s, {record['peak_share']:.1%} of a "
            f"large matrix product ({record['matmul_peak'] / 1e12:.3g} TFLOP/s)",
        ]
    )
