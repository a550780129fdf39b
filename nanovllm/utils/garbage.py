"""Garbage collections that a GPU does not wait for."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def only_new_garbage() -> Generator[None, None, None]:
    """Within it, collections leave out the objects that were there before.

    A full collection walks through all objects of Python, torch and transformers, which takes a
    CPU about 0.1 s. Nothing that was there is freed by a collection until the end. Where objects
    are frozen already (`gc.freeze`), by the user or by another engine, whoever did it ends it.
    """
    is_first = gc.get_freeze_count() == 0
    try:
        if is_first:
            gc.freeze()
        yield
    finally:
        if is_first:
            gc.unfreeze()
