"""Garbage collections that a GPU does not wait for."""

from __future__ import annotations

import gc
from collections.abc import Generator
from contextlib import contextmanager

# In the place of Python's 10.
YOUNGER_PER_FULL = 1000


@contextmanager
def few_full_collections() -> Generator[None, None, None]:
    """Within it, a full collection comes only after 1,000 smaller ones.

    A full one walks through all objects of Python, torch and transformers, 0.1 s and more of a CPU.
    Steps with 1,024 sequences would have one every 3 s. One that is due then comes at the end.

    NOTE: the threshold is the process's, so within it no code of users should run. Where two of
    these overlap, the first to begin also ends it for the other, and nothing stays.
    """
    youngest, young, full = gc.get_threshold()
    is_first = full < YOUNGER_PER_FULL
    try:
        if is_first:
            gc.set_threshold(youngest, young, YOUNGER_PER_FULL)
        yield
    finally:
        if is_first:
            gc.set_threshold(youngest, young, full)
