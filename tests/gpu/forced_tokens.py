"""Logits of an engine whose requests are made to go on with tokens fixed in advance."""

import random

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine import draws


def forced_token(step: int) -> int:
    """The token that all requests get from their draw number `step`."""
    return 7 + 13 * step


def forced_logits(
    monkeypatch: pytest.MonkeyPatch, engine: LLM, prompts: list[list[int]], steps: int
) -> torch.Tensor:
    """float32 [steps, prompts, vocab_size] on the host; the first step is the prefill."""
    kept: list[torch.Tensor] = []

    def force(logits: torch.Tensor, *_: object) -> torch.Tensor:
        kept.append(logits.float().cpu())
        return torch.full((len(logits),), forced_token(len(kept) - 1), device=logits.device)

    with monkeypatch.context() as patch:
        patch.setattr(draws, "sample", force)
        outputs = engine.generate(prompts, max_tokens=steps, ignore_eos=True, use_tqdm=False)
    for output in outputs:
        assert output["token_ids"] == [forced_token(step) for step in range(steps)]
    return torch.stack(kept)


def ragged_prompts(count: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, random lengths."""
    rng = random.Random(seed)
    return [
        [rng.randrange(2, vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]
