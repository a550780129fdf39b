"""What CUDA graphs of decode steps share, one graph for each batch size of a ladder.

A decode step launches hundreds of small kernels; replaying a captured graph launches them at once.
All graphs read the same static inputs, write their logits to the same static buffer, and share one
memory pool for everything between, so a step's logits are valid until the next replay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then every multiple of 16 up to `largest`, which is always among them."""
    ladder = [1, 2, 4, 8, *range(16, largest + 1, 16)]
    return sorted({size for size in ladder if size <= largest} | {largest})


class GraphMemory:
    """Static inputs, `num_inputs` integers, and logits of the largest size; a pool for the rest."""

    def __init__(
        self,
        sizes: list[int],
        num_inputs: int,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        synchronize: Callable[[], None],  # waits for all on the device
    ) -> None:
        self.sizes = sizes
        self.synchronize = synchronize
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # captures run on it
        self.num_graphs = 0
        self.inputs = torch.zeros(num_inputs, dtype=torch.int32, device=device)
        self.logits = torch.zeros(sizes[-1], vocab_size, dtype=dtype, device=device)

    def release(self, num_graphs: int) -> None:
        """Says that so many graphs are gone."""
        self.num_graphs -= num_graphs
        if self.num_graphs == 0:
            # torch gives a pool up with the last graph in it, and does not take it back.
            self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Captures what is issued in it.

        `torch.cuda.graph` would give all cached memory back to the device at every graph (and
        collect garbage, before torch 2.9), to take it again for the next.
        """
        self.synchronize()
        with torch.cuda.stream(self.stream):
            # Other threads may go on using CUDA meanwhile, such as NCCL's watchdog.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):  # there may be streams that have not been joined
                    graph.capture_end()
                # The allocator may take the old one for captured still.
                self.pool = torch.cuda.graph_pool_handle()
                raise
            graph.capture_end()
        self.num_graphs += 1

    def size_for(self, count: int) -> int:
        """The smallest size on the ladder that holds `count` sequences."""
        return self.sizes[bisect_left(self.sizes, count)]
