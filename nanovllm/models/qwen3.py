"""Qwen3 by the name that this project's specification gives it (tests/seed_spec.py).

Its layers are in decoder.py, and what is its own is an entry in architectures.py.
"""

from nanovllm.models.decoder import DecoderForCausalLM

Qwen3ForCausalLM = DecoderForCausalLM
