"""Ranks that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from nanovllm.layers.parallel import ParallelGroup


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


def on_ranks(size: int, run: Callable[[ParallelGroup], torch.Tensor]) -> list[torch.Tensor]:
    """What `run` gives on each rank."""
    board, barrier, results = [None] * size, threading.Barrier(size), [torch.empty(0)] * size

    def work(rank: int) -> None:
        try:
            results[rank] = run(ThreadGroup(rank, size, board, barrier))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
