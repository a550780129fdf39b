"""The engine to measure, and how long it took to start."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm.bench import BenchError, DoesNotFit
from nanovllm.bench.shapes import shape_directory
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.tiny import CHECKPOINT_DIR

# The embedded model's name among the shapes; its weights are no random ones.
TINY = "tiny"


@dataclass(frozen=True)
class StartedEngine:
    """An engine, what its model is called, and the seconds from nothing to ready."""

    engine: LLMEngine
    name: str
    startup_seconds: float


@contextmanager
def start_engine(
    shape: str | None, layers: int | None, model: str | None, **options: Any
) -> Iterator[StartedEngine]:
    """An engine for `model`, a directory or hub id, or else for `shape`; closed afterwards.

    Args:
        shape: one of `SIZES`, with random weights, or "tiny".
        layers: so many layers of the shape; None: all of them.
        model: a checkpoint.
        options: fields of `Config`.

    Raises:
        DoesNotFit: there is not enough memory.
        BenchError: there is no such model, or an option's value is not allowed.
    """
    with model_directory(shape, layers, model) as (directory, name):
        random = model is None and shape != TINY
        start = time.perf_counter()
        try:
            engine = LLMEngine(directory, load_format="dummy" if random else "auto", **options)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise DoesNotFit(str(error)) from error
        except (ValueError, FileNotFoundError) as error:
            raise BenchError(str(error)) from error
        startup_seconds = time.perf_counter() - start
        with engine:
            yield StartedEngine(engine, name, startup_seconds)


@contextmanager
def model_directory(
    shape: str | None, layers: int | None, model: str | None
) -> Iterator[tuple[str, str]]:
    """Where the model is, and what it is called."""
    if model is not None:
        yield model, Path(model).name
    elif shape is None or shape == TINY:
        yield str(CHECKPOINT_DIR), TINY
    else:
        with shape_directory(shape, layers) as directory:
            yield directory, shape
