"""Qwen3, under the name that the original specification gives it.

What is Qwen3's own is an entry in architectures.py; its layers are those of decoder.py, which
`forward_attention` and `forward_ffn` run in two calls.
"""

from nanovllm.models.architectures import QWEN3
from nanovllm.models.decoder import DecoderForCausalLM as Qwen3ForCausalLM

__all__ = ["QWEN3", "Qwen3ForCausalLM"]
