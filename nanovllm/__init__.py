"""A small, readable LLM inference engine with an attention/FFN pipeline."""

from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.llm import LLM
from nanovllm.logprobs import Logprob
from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "Config", "LLMEngine", "Logprob", "SamplingParams", "__version__"]

__version__ = "0.1.0"
