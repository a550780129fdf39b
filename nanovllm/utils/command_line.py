"""Manners of the scripts: an error is one line and exit code 2, an interrupt has no traceback."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; an option must be given by its whole name."""

    def __init__(self, description: str | None, **options: object) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,  # type: ignore[arg-type]
        )

    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)


def fail(script: str, message: object) -> NoReturn:
    """Ends the script because of what it was asked for."""
    print(f"{script}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def number(kind: type, least: float = 1) -> Callable[[str], Any]:
    """An argument type: numbers of `kind` from `least` on."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise ArgumentTypeError(f"{text} is not allowed: it must be at least {least}")
        return value

    convert.__name__ = kind.__name__
    return convert


def text(given: str) -> str:
    """An argument type: whole characters, at least one."""
    if not given:
        raise ArgumentTypeError("it is empty")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ArgumentTypeError(f"{given!a} is no UTF-8") from None
    return given


def output(*endings: str) -> Callable[[str], Path]:
    """An argument type: a file to write; refuses at once what would fail only at the end.

    Its name must end in one of `endings`, if there are any; a picture needs matplotlib.
    """

    def convert(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            raise ArgumentTypeError(f"{path} is a directory")
        if not path.parent.is_dir():
            raise ArgumentTypeError(f"{path}: there is no directory {path.parent} for a file")
        target = path.resolve()
        written = [target] if target.exists() else []
        if not written or target.is_file():  # which may be written beside it, and then replace it
            written.append(target.parent)
        if not all(os.access(place, os.W_OK) for place in written):
            raise ArgumentTypeError(f"{path} must not be written")
        if endings and path.suffix not in endings:
            raise ArgumentTypeError(f"{path}: the name must end in {' or '.join(endings)}")
        if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
            raise ArgumentTypeError(f"{path}: a picture needs matplotlib: pip install matplotlib")
        return path

    return convert


@contextmanager
def in_one_line(script: str, *errors: type[Exception]) -> Iterator[None]:
    """Ends the script with one line if one of `errors` or an interrupt comes up inside."""
    try:
        yield
    except errors as error:
        fail(script, error)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
