"""Decode steps at a given batch and context, without the prefill that would come before them.

    workload = DecodeWorkload(batch=256, context=1024, output=64)
    fill_cache(engine)
    seconds = run_turn(engine, workload, workload.draw_prompts(vocab_size))

A turn seats N requests whose prompts count as read: scheduler and block manager treat them like
any other, each with KV blocks of its own, but nothing is computed, and the cache holds random
numbers. From there on the engine runs as ever, from scheduling to the tokens on the host. Contexts
grow by one token a step, and every turn begins at the same context again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanovllm.bench import BenchError, DoesNotFit
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import ADMISSION_RESERVE
from nanovllm.sampling_params import SamplingParams

# Steps at each end of a turn that do not count: there the engine starts up or runs dry.
EDGE_STEPS = 2
SHORTEST_OUTPUT = 2 * EDGE_STEPS + 1


@dataclass(frozen=True)
class DecodeWorkload:
    """Turns of `output` decode steps of `batch` sequences that begin with `context` tokens."""

    batch: int
    context: int
    output: int

    def __post_init__(self) -> None:
        if self.output < SHORTEST_OUTPUT:
            raise BenchError(
                f"output={self.output} is not allowed: it must be at least {SHORTEST_OUTPUT}, as "
                f"the first and the last {EDGE_STEPS} steps of a turn do not count"
            )

    @property
    def mean_context(self) -> float:
        """Tokens a sequence that a step reads, on the average of a turn."""
        return self.context + (self.output + 1) / 2

    @property
    def max_len(self) -> int:
        """Tokens of a sequence at the end of a turn; the last of them is never read."""
        return self.context + self.output + 1

    def blocks(self, block_size: int) -> int:
        """KV blocks that a turn needs."""
        return kv_blocks(self.batch, self.max_len, block_size)

    def check_fits(self, engine: LLMEngine) -> None:
        """Raises DoesNotFit if the engine has no room for all sequences at a time."""
        runner = engine.model_runner
        if self.max_len > runner.max_model_len:
            raise DoesNotFit(
                f"context={self.context} and output={self.output} are not allowed: together they "
                f"must be below the model's longest sequence, {runner.max_model_len} tokens"
            )
        needed = self.blocks(runner.block_size)
        if self.batch > engine.scheduler.max_num_seqs or needed > runner.num_blocks:
            raise DoesNotFit(
                f"batch={self.batch} at context={self.context} does not fit: it needs {needed} KV "
                f"blocks of {runner.block_size} tokens, and there is memory for "
                f"{runner.num_blocks}"
            )

    def draw_prompts(self, vocab_size: int) -> list[list[int]]:
        """A prompt for each sequence, the same every time: a random token, and zeros.

        No step reads more than the first: the cache holds random numbers for the rest.
        """
        firsts = np.random.default_rng(0).integers(0, vocab_size, self.batch).tolist()
        rest = [0] * (self.context - 1)
        return [[first, *rest] for first in firsts]


def kv_blocks(sequences: int, tokens: int, block_size: int) -> int:
    """KV blocks for so many sequences of `tokens` tokens that are all admitted at a time."""
    blocks = sequences * -(-tokens // block_size)
    return int(blocks * (1 + 2 * ADMISSION_RESERVE)) + 2


def room_options(device: torch.device, sequences: int, tokens: int) -> dict[str, Any]:
    """Fields of `Config` that make room for so many sequences of `tokens` tokens, none shared."""
    options: dict[str, Any] = {
        "max_num_seqs": sequences,
        "max_model_len": tokens,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.94,  # there are no requests but ours
    }
    if device.type == "cpu":
        options["num_kvcache_blocks"] = kv_blocks(sequences, tokens, Config.kvcache_block_size)
    return options


@torch.inference_mode()
def fill_cache(engine: LLMEngine) -> None:
    """Random numbers for the whole KV cache: zeros would make some work easier than it is."""
    generator = torch.Generator(engine.model_runner.device).manual_seed(0)
    for layer in engine.model_runner.model.model.layers:
        layer.self_attn.k_cache.normal_(generator=generator)
        layer.self_attn.v_cache.normal_(generator=generator)


def run_turn(engine: LLMEngine, workload: DecodeWorkload, prompts: list[list[int]]) -> list[float]:
    """Runs one turn; returns the wall time of each of its steps in seconds, without the edges."""
    seat(engine, workload, prompts)
    moments = [time.perf_counter()]
    while not engine.is_finished():
        engine.step()
        moments.append(time.perf_counter())
    return np.diff(moments)[EDGE_STEPS:-EDGE_STEPS].tolist()


def seat(engine: LLMEngine, workload: DecodeWorkload, prompts: list[list[int]]) -> None:
    """Adds a request a prompt, whose prefill counts as done and drew its first token again."""
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=workload.output)
    try:
        for prompt in prompts:
            engine.add_computed_request([*prompt, prompt[0]], params)
    except ValueError as error:
        raise BenchError(f"batch={workload.batch} cannot run at a time: {error}") from error
