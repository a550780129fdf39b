"""The embedded model: a very small Qwen3 checkpoint that this project trained itself.

    from nanovllm.tiny import CHECKPOINT_DIR, PROMPTS

`tools/train_tiny` in the repository is how it was made. This module only says where things are,
so it imports neither torch nor transformers.
"""

from pathlib import Path

CHECKPOINT_DIR: Path = Path(__file__).resolve().parent / "checkpoint"
"""The shipped checkpoint, a directory in the usual Hugging Face layout."""

PROMPTS: tuple[str, ...] = (
    "Once upon a time",
    "Tom went to the",
    "The little fox",
    "Anna found a",
    "One rainy day",
    "Long ago, a brave knight",
    "One sunny morning",
    "One dark night",
    "Deep in the forest",
    "Ben wanted to make a",
    "Lily lost a",
    "Every morning, the tiny robot",
    "The young princess",
    "There was once a",
    "Far away, near the",
    "The small rabbit was",
)
"""The standard prompts: the beginnings the model is checked on, each telling another story."""

__all__ = ["CHECKPOINT_DIR", "PROMPTS"]
