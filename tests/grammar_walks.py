"""Random walks through a grammar: every token that its mask allows must be accepted."""

from __future__ import annotations

import random

import numpy as np

from nanovllm import LLM, SamplingParams


def refused_tokens(llm: LLM, params: SamplingParams, steps: int, seed: int) -> list[str]:
    """Texts of tokens that are allowed and then refused, on the first such place of a walk."""
    rng = random.Random(seed)
    matcher = llm.grammars.matcher(params)
    bits = np.zeros((1, -(-llm.texts.vocab_size // 32)), np.int32)
    for _ in range(steps):
        matcher.fill_next_token_bitmask(bits)
        allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
        refused = []
        for token in map(int, allowed):
            if matcher.accept_token(token):
                matcher.rollback(1)
            else:
                refused.append(llm.texts.token_text(token) or "")
        if refused or matcher.is_terminated():
            return refused
        going_on = [int(token) for token in allowed if token not in llm.eos_ids]
        if not going_on:
            return []
        matcher.accept_token(rng.choice(going_on))
    return []
