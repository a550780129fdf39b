"""Qwen3 where the original specification has it; its layers are in decoder.py.

What is its own is an entry in architectures.py.
"""

from nanovllm.models.decoder import DecoderForCausalLM

Qwen3ForCausalLM = DecoderForCausalLM
