"""Published shapes of Qwen3, as the fields of a config.json; their weights are drawn at random.

with shape_directory("8B", layers=4) as directory:
    LLM(directory, load_format="dummy")
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# What all sizes have in common, but for the defaults of transformers.
COMMON: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
}

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, tie_word_embeddings
SIZES: dict[str, tuple[int, int, int, int, bool]] = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
# The embedded model's name among the shapes; its weights are no random ones.
TINY = "tiny"


def published_config(shape: str, layers: int | None = None) -> dict[str, Any]:
    """config.json of Qwen3-`shape`, with another number of layers if one is given."""
    hidden, intermediate, all_layers, heads, tied = SIZES[shape]
    return {
        **COMMON,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_hidden_layers": layers or all_layers,
        "tie_word_embeddings": tied,
    }


@contextmanager
def shape_directory(shape: str, layers: int | None = None) -> Iterator[str]:
    """A temporary directory with the config.json of that shape."""
    with TemporaryDirectory(prefix=f"qwen3-{shape}-") as directory:
        text = json.dumps(published_config(shape, layers), indent=2)
        (Path(directory) / "config.json").write_text(text, encoding="utf-8")
        yield directory
