"""A small engine on the GPU, and what one writes after the embedded model's prompts."""

from typing import Any

from nanovllm import LLM
from nanovllm.tiny import PROMPTS

MAX_TOKENS = 48


def small_engine(model: Any = None, **options: Any) -> LLM:
    """With few graphs and little memory, so that several fit beside each other."""
    given = {} if model is None else {"model": str(model)}
    defaults = {"max_num_seqs": 8, "max_model_len": 1024, "num_kvcache_blocks": 64}
    return LLM(device="cuda", **given, **(defaults | options))


def texts(engine: LLM, count: int = 8, max_tokens: int = MAX_TOKENS) -> list[str]:
    """What the engine writes after the standard prompts, from the first again after the last."""
    given = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    outputs = engine.generate(given, temperature=0, max_tokens=max_tokens, use_tqdm=False)
    return [output["text"] for output in outputs]
