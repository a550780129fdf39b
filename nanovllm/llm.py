"""`LLM`, the name that vLLM's and nano-vllm's users know the engine by."""

from __future__ import annotations

from nanovllm.engine.llm_engine import LLMEngine


class LLM(LLMEngine):
    __doc__ = LLMEngine.__doc__
