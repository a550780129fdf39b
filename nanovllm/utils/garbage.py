"""Garbage collections that a GPU does not wait for."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def only_new_garbage() -> Generator[None, None, None]:
    """Within it, collections leave out the objects that were there before.

    A full collection walks through all objects of Python, torch and transformers, which takes a
    CPU 0.1 s or more. What was there is freed by a collection only after the end.

    NOTE: Python knows one set of frozen objects (`gc.freeze`), so where two of these overlap, the
    first to end ends both, and objects that a user froze are as all others afterwards. No count
    of frozen objects tells: Python 3.12 starts with some.
    """
    try:
        gc.freeze()
        yield
    finally:
        gc.unfreeze()
