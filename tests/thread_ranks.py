"""Ranks that are threads of the test's own process, and logits for them."""

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch

from nanovllm.layers.parallel import ParallelGroup
from tests.thread_rounds import run_all

T = TypeVar("T")


class ThreadGroup(ParallelGroup):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "board", board)
        object.__setattr__(self, "barrier", barrier)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.board[self.rank] = x
        self.barrier.wait()
        everyone = torch.stack(self.board)
        self.barrier.wait()
        return everyone


def on_ranks(size: int, run: Callable[[ParallelGroup], T]) -> list[T]:
    """What `run` gives on each rank."""
    board, barrier = [None] * size, threading.Barrier(size)
    results: dict[int, T] = {}

    def work(rank: int) -> None:
        try:
            results[rank] = run(ThreadGroup(rank, size, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    run_all(*(partial(work, rank) for rank in range(size)))
    return [results[rank] for rank in range(size)]


def random_logits(rows: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    """Flat and steep rows, with ties, infinities and, now and then, NaN."""
    logits = (
        torch.randn(rows, vocab) * torch.tensor([0.0, 0.01, 1.0, 8.0])[torch.randint(4, (rows, 1))]
    )
    logits = logits.to(dtype)
    for row in range(rows):
        kind = random.randrange(8)
        if kind == 0:
            logits[row, torch.rand(vocab) < 0.7] = float("-inf")
        elif kind == 1:
            logits[row, random.randrange(vocab)] = float("inf")
        elif kind == 2:
            logits[row, random.randrange(vocab)] = float("nan")
        elif kind == 3:
            logits[row] = float("-inf")
        elif kind == 4:
            logits[row] = (logits[row] * 2).round() / 2
    return logits
