"""What an engine writes after the embedded model's prompts."""

from __future__ import annotations

from nanovllm import LLM
from nanovllm.tiny import PROMPTS

MAX_TOKENS = 48


def texts(engine: LLM, count: int = 8, max_tokens: int = MAX_TOKENS) -> list[str]:
    """What the engine writes after the standard prompts, from the first again after the last."""
    given = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    outputs = engine.generate(given, temperature=0, max_tokens=max_tokens, use_tqdm=False)
    return [output["text"] for output in outputs]
