"""The one model family: Qwen3 dense."""
