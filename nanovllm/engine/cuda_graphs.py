"""Decode steps as CUDA graphs, one per batch size of a ladder.

A decode step launches hundreds of small kernels; replaying a captured graph launches them at once.
All graphs read the same static input buffer and share one memory pool, so a step's logits are
valid until the next replay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from nanovllm.engine.step_inputs import InputLayout

# Runs a decode step of the layout on static inputs, and returns its logits.
DecodeStep = Callable[[InputLayout, torch.Tensor], torch.Tensor]


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then every multiple of 16 up to `largest`, which is always among them."""
    ladder = [1, 2, 4, 8, *range(16, largest + 1, 16)]
    return sorted({size for size in ladder if size <= largest} | {largest})


class DecodeGraphs:
    """Captured decode steps for batches of up to `max(sizes)` sequences."""

    def __init__(
        self,
        step: DecodeStep,
        sizes: list[int],
        max_blocks: int,
        padding: Callable[[InputLayout, np.ndarray], None],
        device: torch.device,
        *,
        show_progress: bool = True,
    ) -> None:
        """Captures `step` once per size.

        Args:
            step: what to capture.
            sizes: batch sizes, rising.
            max_blocks: width of the block tables.
            padding: fills inputs with padding rows, which the capture runs on.
            device: a CUDA device.
            show_progress: whether to show a progress bar.
        """
        self.sizes = sizes
        self.inputs = torch.zeros(
            InputLayout.decode(sizes[-1], max_blocks).size, dtype=torch.int32, device=device
        )
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.logits: dict[int, torch.Tensor] = {}
        pool = torch.cuda.graph_pool_handle()
        # The largest first: the smaller ones then fit into the pool's memory.
        bar = tqdm(sizes[::-1], desc="Capturing CUDA graphs", disable=not show_progress)
        for size in bar:
            layout = InputLayout.decode(size, max_blocks)
            host = np.empty(layout.size, np.int32)
            padding(layout, host)
            inputs = self.inputs[: layout.size]
            inputs.copy_(torch.from_numpy(host))
            step(layout, inputs)  # outside the capture: compiles kernels, creates handles
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self.logits[size] = step(layout, inputs)
            self.graphs[size] = graph

    def size_for(self, count: int) -> int:
        """The smallest captured batch size that holds `count` sequences."""
        return self.sizes[bisect_left(self.sizes, count)]

    def replay(self, layout: InputLayout, host: torch.Tensor) -> torch.Tensor:
        """Runs a step of a captured size on `host`, pinned int32 [layout.size]."""
        self.inputs[: layout.size].copy_(host, non_blocking=True)
        self.graphs[layout.num_seqs].replay()
        return self.logits[layout.num_seqs]
