"""Reads the files of a checkpoint, so that every error names the file and its true cause.

Nothing here follows a path that a file contains, and nothing blocks: a FIFO is refused unopened.
Each function takes the class of its errors, a `ValueError` of the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Far above any real one (the largest are tokenizers, about 30 MiB): parsed JSON takes several
# times its size.
MAX_TEXT_BYTES = 96 << 20
MAX_CAUSE_LENGTH = 400

Error = type[ValueError]


def is_there(path: Path) -> bool:
    """Whether a directory entry of that name exists, be it readable or not, a file or not."""
    try:
        path.lstat()
    except (FileNotFoundError, ValueError):  # a name with a null byte cannot be there
        return False
    except OSError:
        pass  # there or not, whoever reads it says why it cannot be read
    return True


def check_file(path: Path, error: Error) -> int:
    """Returns the size in bytes of a regular file; raises `error` if it is none or unreadable."""
    with _naming_os_errors(path, error):
        status = path.stat()
        if not path.is_file():
            kind = (
                "a directory" if path.is_dir() else "a FIFO" if path.is_fifo() else "a special file"
            )
            raise error(f"{path} is {kind}, not a regular file")
        with open(path, "rb"):
            return status.st_size


def read_text(path: Path, error: Error) -> str:
    """The text of a UTF-8 file; raises `error` if it cannot be read or holds something else."""
    try:
        return _read(path, error).decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{path} is damaged: {cause}") from cause


def read_object(path: Path, error: Error) -> dict[str, Any]:
    """The JSON object in a file; raises `error` if it cannot be read or holds something else."""
    data = _read(path, error)
    try:
        value = json.loads(data.decode("utf-8"))
    # Deep nesting overflows the parser's stack.
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise error(f"{path} does not hold a JSON object")
    return value


@contextmanager
def naming(where: str, error: Error) -> Iterator[None]:
    """Whatever a library raises within becomes `error` and names `where`, panics of Rust too."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as cause:
        # NOTE: a panic is a BaseException, and its class cannot be imported.
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":
            raise
        text = f"{type(cause).__name__}: {cause}"[:MAX_CAUSE_LENGTH]
        raise error(f"{where}: {text}") from cause


def _read(path: Path, error: Error) -> bytes:
    size = check_file(path, error)
    if size > MAX_TEXT_BYTES:
        raise error(f"{path} has {size} bytes, and more than {MAX_TEXT_BYTES} are not read")
    with _naming_os_errors(path, error), open(path, "rb") as file:
        return file.read()


@contextmanager
def _naming_os_errors(path: Path, error: Error) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as cause:
        raise error(f"{path} is missing") from cause
    except PermissionError as cause:
        raise error(f"{path} cannot be read: no permission") from cause
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror or cause}") from cause
