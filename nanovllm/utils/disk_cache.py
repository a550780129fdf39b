"""Small JSON values kept on disk between runs: what was measured once on this machine.

A value belongs to a key, an object that says what the value depends on; its hash is the file's
name. A cache may always be lost: what cannot be read is not there, what cannot be written is not
kept, and either is only a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanovllm.utils.json_files import read_text

logger = logging.getLogger(__name__)

# What reading, parsing and writing may raise: RuntimeError for a user without a home directory and
# for deep nesting, ValueError for what is no JSON and for paths that cannot be.
FAILURES = (OSError, RuntimeError, ValueError, MemoryError)


def cache_folder() -> Path:
    """Below $XDG_CACHE_HOME, or else ~/.cache; RuntimeError: this user has no home directory."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification wants a relative path ignored, as an empty one is.
    return (root if root.is_absolute() else Path.home() / ".cache") / "nano-vllm"


class DiskCache:
    """JSON values by key, in files of `folder` whose names begin with `name`.

    The folder, by default `cache_folder()`, is made when it is first written to.
    """

    def __init__(self, name: str, folder: Path | None = None) -> None:
        self.name = name
        self.folder = folder

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file of that key, whether it exists or not."""
        text = json.dumps(key, sort_keys=True, allow_nan=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return (self.folder or cache_folder()) / f"{self.name}-{digest}.json"

    def read(self, key: Mapping[str, Any]) -> Any:
        """The value written under that key, or by whoever can; None if none can be read."""
        try:
            path = self.path(key)
            path.stat()  # FileNotFoundError: nothing was written yet
            return json.loads(read_text(path, ValueError))
        except FileNotFoundError:
            return None
        except FAILURES as error:
            self._warn("read", error)
            return None

    def write(self, key: Mapping[str, Any], value: Any) -> None:
        """Keeps a value under that key; TypeError or ValueError if either is no plain JSON."""
        text = json.dumps(value, allow_nan=False)
        try:
            _replace(self.path(key), text)
        except FAILURES as error:
            self._warn("written", error)

    def _warn(self, done: str, error: Exception) -> None:
        what = f"{type(error).__name__}: {error}"
        logger.warning("Cache of %s: cannot be %s: %.300s", self.name, done, what)


def _replace(path: Path, text: str) -> None:
    """Writes a file at once: a reader finds the old text or the new one, and never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: a rename is atomic within a file system only.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        if path.is_dir() and not path.is_symlink():
            os.rename(path, f"{temporary}.aside")  # a file cannot replace a directory
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # what is on its way says more
            os.unlink(temporary)
        raise
