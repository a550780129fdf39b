"""A small, readable LLM inference engine with an attention/FFN pipeline."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.config import Config
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.llm import LLM
    from nanovllm.logprobs import Logprob
    from nanovllm.sampling_params import SamplingParams

__all__ = ["LLM", "Config", "LLMEngine", "Logprob", "SamplingParams", "__version__"]

__version__ = "0.1.0"

# Imported when they are asked for: torch takes seconds, in which Ctrl-C must end a script quietly.
_MODULES = {
    "Config": "config",
    "LLMEngine": "engine.llm_engine",
    "LLM": "llm",
    "Logprob": "logprobs",
    "SamplingParams": "sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
