"""What tests of unsound checkpoints share; a sound one to be spoilt is the fixture `copy`."""

from pathlib import Path

import pytest

from nanovllm import LLM
from tests.checkpoint_mutations import add_tokenizer
from tests.checkpoints import Shape

SMALL = {"device": "cpu", "max_model_len": 64, "kvcache_block_size": 16, "num_kvcache_blocks": 8}
SHAPE = Shape(layers=2, heads=2, kv_heads=1, hidden=32, intermediate=64)


def error_of(directory: Path | str, kind: type[Exception] = ValueError, **options) -> str:
    """What an engine of that checkpoint says."""
    with pytest.raises(kind) as caught:
        LLM(str(directory), **{**SMALL, **options})
    return str(caught.value)


def write_sound(directory: Path) -> None:
    """A checkpoint with every file that is read, the index aside."""
    SHAPE.write(directory)
    add_tokenizer(directory)
