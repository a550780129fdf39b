"""Tokens equal those of transformers, whatever the architecture, the mode and the scheduler do."""

import random
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.checkpoints import TABLE, Shape, greedy, prompts
from tests.engine.cases import PIPELINED, check_empty, drain

MAX_TOKENS = 24

# The modes that a CPU has; all others fall back to the first.
MODES: dict[str, dict[str, Any]] = {"sequential": {}, "microbatch": PIPELINED}

# Each makes another part of the engine work: long prompts in chunks, scarce KV blocks with
# preemption, few sequences at a time, no prefix cache.
SETTINGS: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 7},
    {"num_kvcache_blocks": 6, "max_num_batched_tokens": 13},
    {"kvcache_block_size": 32, "max_num_seqs": 2},
    {"max_num_seqs": 3, "num_kvcache_blocks": 9},
    {"kvcache_block_size": 256},
    {"enable_prefix_caching": False, "num_kvcache_blocks": 6},
]

COUNTS = {"qwen3": 20}
CASES = [(kind, seed) for kind in TABLE for seed in range(COUNTS.get(kind, 10))]


def engine(directory: Path, mode: str, **options: Any) -> LLM:
    options = {"kvcache_block_size": 16, "max_model_len": 128} | options
    return LLM(str(directory), device="cpu", **MODES[mode], **options)


@pytest.mark.parametrize(("model_type", "seed"), CASES)
def test_greedy_tokens_equal_those_of_transformers(tmp_path, model_type, seed):
    """Prompts share beginnings, and their limits differ, so requests finish in mid-batch."""
    model = Shape.random(seed, model_type).write(tmp_path)
    rng = random.Random(seed)
    given = prompts(seed, count=rng.randint(3, 8))
    limits = [rng.randint(1, MAX_TOKENS) for _ in given]
    expected = [greedy(model, *pair) for pair in zip(given, limits, strict=True)]
    settings = rng.sample(SETTINGS, 4)
    for mode, options in zip(list(MODES) * 2, settings, strict=True):
        with engine(tmp_path, mode, **options) as llm:
            ids = [
                llm.add_request(prompt, temperature=0, max_tokens=limit)
                for prompt, limit in zip(given, limits, strict=True)
            ]
            done = drain(llm)
            check_empty(llm)
        assert [done[i] for i in ids] == expected, (mode, options)


@pytest.mark.parametrize("mode", MODES)
def test_aborts_amid_preemptions_leave_the_others_as_they_are(tmp_path, mode):
    """The settings above would prove little if blocks never ran out, or nothing were pipelined."""
    model = Shape(seed=1).write(tmp_path)
    given = prompts(1, count=7, longest=40)
    with engine(tmp_path, mode, num_kvcache_blocks=8) as llm:
        ids = [llm.add_request(p, temperature=0, max_tokens=MAX_TOKENS) for p in given]
        done = {}
        for count, aborted in ((3, ids[2]), (5, ids[5])):
            done |= {o["request_id"]: o["token_ids"] for _ in range(count) for o in llm.step()}
            llm.abort(aborted)
        done |= drain(llm)
        check_empty(llm)
        assert llm.scheduler.num_preemptions > 0
        pipelined = llm.model_runner.get_pipeline_statistics()["steps"]["pipelined"]
    assert (pipelined > 0) == (mode != "sequential")
    assert done.keys() >= {*ids} - {ids[2], ids[5]}
    for request_id, tokens in done.items():
        assert tokens == greedy(model, given[request_id], MAX_TOKENS)
