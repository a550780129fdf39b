"""What the caller has told torch about its own tensors changes nothing in an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nanovllm import LLM, SamplingParams
from tests.engine.cases import OPTIONS, PIPELINED, PROMPTS, said

MIXED = [
    SamplingParams(temperature=0, max_tokens=9, logprobs=2, prompt_logprobs=1),
    SamplingParams(seed=3, max_tokens=9, logit_bias={5: 2.0}, repetition_penalty=1.2),
    SamplingParams(seed=4, max_tokens=9, top_k=20, top_p=0.9),
    SamplingParams(seed=5, max_tokens=9, min_p=0.1, stop=["a"]),
]


@contextmanager
def default_device() -> Iterator[None]:
    """One that an engine on the CPU cannot use; in a caller's script it is "cuda"."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def autocast() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yield


@pytest.mark.parametrize("setting", [default_device, autocast])
@pytest.mark.parametrize("options", [{}, PIPELINED, {"tensor_parallel_size": 2}], ids=str)
def test_tokens_are_the_same(sound, setting, options):
    options = OPTIONS | options | {"num_kvcache_blocks": 8}
    with LLM(str(sound), **options) as engine:
        expected = said(engine.generate(PROMPTS, MIXED, use_tqdm=False))
        with setting():
            assert said(engine.generate(PROMPTS, MIXED, use_tqdm=False)) == expected
    with setting(), LLM(str(sound), **options) as engine:
        assert said(engine.generate(PROMPTS, MIXED, use_tqdm=False)) == expected
