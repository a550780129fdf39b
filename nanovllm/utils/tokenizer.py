"""The tokenizer of a checkpoint, if it has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer in `directory`; None if it holds none (a bare config.json)."""
    if not any((directory / name).is_file() for name in FILES):
        return None
    # Imported late: transformers takes seconds, and dummy weights do without it.
    from transformers import AutoTokenizer

    # NOTE: else transformers asks on stdin whether to run the checkpoint's code.
    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
