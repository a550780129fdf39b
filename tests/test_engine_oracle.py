"""Greedy tokens equal those of transformers, token for token, whatever the scheduler has to do."""

from __future__ import annotations

import random

import pytest

from nanovllm import LLM
from tests.checkpoints import Shape, greedy, prompts

MAX_TOKENS = 24

# Each makes another part of the engine work: long prompts in chunks, scarce KV blocks with
# preemption, one sequence at a time, no prefix cache.
SETTINGS = [
    {"kvcache_block_size": 16},
    {"kvcache_block_size": 16, "max_num_batched_tokens": 7},
    {"kvcache_block_size": 16, "num_kvcache_blocks": 7},
    {"kvcache_block_size": 16, "num_kvcache_blocks": 6, "max_num_batched_tokens": 13},
    {"kvcache_block_size": 32, "max_num_seqs": 2},
    {"kvcache_block_size": 256},
    {"kvcache_block_size": 16, "enable_prefix_caching": False},
    {"kvcache_block_size": 16, "enable_prefix_caching": False, "num_kvcache_blocks": 6},
]


@pytest.mark.parametrize("seed", range(24))
def test_greedy_equals_transformers(tmp_path, seed):
    model = Shape.random(seed).write(tmp_path)
    given = prompts(seed, count=6)
    expected = [greedy(model, prompt, MAX_TOKENS) for prompt in given]
    settings = random.Random(seed).sample(SETTINGS, 3)
    for options in settings:
        with LLM(str(tmp_path), device="cpu", max_model_len=128, **options) as llm:
            outputs = llm.generate(given, temperature=0, max_tokens=MAX_TOKENS, use_tqdm=False)
            blocks = llm.scheduler.blocks
            assert len(blocks.free) == blocks.num_blocks
        assert [out["token_ids"] for out in outputs] == expected, options


def test_scarce_blocks_do_preempt(tmp_path):
    """The settings above would prove little if blocks never ran out."""
    model = Shape(seed=3).write(tmp_path)
    given = prompts(5, count=6, longest=40)
    with LLM(
        str(tmp_path), device="cpu", max_model_len=96, kvcache_block_size=16, num_kvcache_blocks=8
    ) as llm:
        outputs = llm.generate(
            given, temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, use_tqdm=False
        )
        assert llm.scheduler.num_preemptions > 0
    for prompt, output in zip(given, outputs, strict=True):
        expected = greedy(model, prompt, MAX_TOKENS)
        assert output["token_ids"][: len(expected)] == expected
