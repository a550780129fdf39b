"""nano-vllm's own benchmark: requests of random lengths, all at once, prefill and decode together.

256 requests with 100 to 1024 tokens of prompt and of output, drawn after seed(0) in the order of
its bench.py: 142,827 tokens in, 133,966 out. The rate is output tokens over the whole run's time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from random import Random

from nanovllm.bench.idle import StepMeter, StepTotals
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams

REQUESTS = 256
SHORTEST, LONGEST = 100, 1024
LARGEST_TOKEN = 10000
MAX_MODEL_LEN = 4096


@dataclass(frozen=True)
class NanoResult:
    """Tokens and seconds of one run, and what its steps took on the device."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    steps: StepTotals

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds


def draw_requests(count: int, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts and their sampling options."""
    random = Random(0)
    largest = min(LARGEST_TOKEN, vocab_size - 1)
    prompts = [
        [random.randint(0, largest) for _ in range(random.randint(SHORTEST, LONGEST))]
        for _ in range(count)
    ]
    params = [
        SamplingParams(
            temperature=0.6, ignore_eos=True, max_tokens=random.randint(SHORTEST, LONGEST)
        )
        for _ in range(count)
    ]
    return prompts, params


def run_nano(engine: LLMEngine, count: int) -> NanoResult:
    """Runs `count` requests, after a short one to warm up."""
    prompts, params = draw_requests(count, engine.model_runner.model_config.vocab_size)
    engine.generate([[*range(SHORTEST)]], temperature=0.6, ignore_eos=True, use_tqdm=False)
    with StepMeter(engine.model_runner) as meter:
        start = time.perf_counter()
        outputs = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
    output_tokens = sum(len(output["token_ids"]) for output in outputs)
    return NanoResult(count, sum(map(len, prompts)), output_tokens, seconds, meter.totals())
