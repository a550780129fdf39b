"""Finds a model's files: a local directory, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.jinja", "tokenizer.model"]
IGNORED = ["*/*.safetensors"]  # such as those of training's checkpoints, which are not read


def resolve_model(model: str) -> Path:
    """Returns the directory of `model`, downloading it if it is a hub id not yet in the cache.

    Raises:
        FileNotFoundError: it is no directory, and the hub does not have it or is out of reach.
    """
    try:
        directory = Path(model).expanduser()
        if directory.is_dir():
            return directory
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(f"model={model!r:.200} cannot be looked for: {error}") from error
    # Imported late: a local model needs no network library.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, allow_patterns=PATTERNS, ignore_patterns=IGNORED))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise FileNotFoundError(
            f"model={model!r} is neither a directory nor a model on the hub that you may read"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"model={model!r} is not a directory, is not in the local hub cache, and the hub "
            "cannot be reached (offline): download it first, or give a directory"
        ) from error
