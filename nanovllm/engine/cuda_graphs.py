"""Decode steps as CUDA graphs, one per batch size of a ladder.

A decode step launches hundreds of small kernels; replaying a captured graph launches them at once.
All graphs read the same static inputs, write their logits to the same static buffer, and share one
memory pool for everything between, so a step's logits are valid until the next replay.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from nanovllm.engine.stage_marks import StageMarks, make_marks
from nanovllm.engine.step_inputs import InputLayout
from nanovllm.layers.attention import AttentionBackend

# Issues a decode step: its layout, its inputs, where its logits go, and its time marks if any.
IssueStep = Callable[[InputLayout, torch.Tensor, torch.Tensor, StageMarks | None], object]


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then every multiple of 16 up to `largest`, which is always among them."""
    ladder = [1, 2, 4, 8, *range(16, largest + 1, 16)]
    return sorted({size for size in ladder if size <= largest} | {largest})


class GraphMemory:
    """What all graphs of a runner share: static inputs and logits, and the pool for the rest."""

    def __init__(
        self,
        sizes: list[int],
        max_blocks: int,
        backend: AttentionBackend,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.sizes = sizes
        self.max_blocks = max_blocks
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # captures run on it
        self.num_graphs = 0
        largest = InputLayout.decode(sizes[-1], max_blocks, backend, pipelined=True)
        self.inputs = torch.zeros(largest.size, dtype=torch.int32, device=device)
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

        As `torch.cuda.graph` does, which would give all cached memory back to the device at every
        graph (and collect garbage, before torch 2.9), to take it again for the next.
        """
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            # Other threads may go on using CUDA meanwhile, such as NCCL's watchdog.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
        self.num_graphs += 1

    def size_for(self, count: int) -> int:
        """The smallest size on the ladder that holds `count` sequences."""
        return self.sizes[bisect_left(self.sizes, count)]


@dataclass(frozen=True)
class CapturedStep:
    """A graph, and its time marks if it is profiled."""

    graph: torch.cuda.CUDAGraph
    marks: StageMarks | None


class DecodeGraphs:
    """Captured decode steps.

    Args:
        step: issues a step.
        memory: shared with other graphs.
        fill_padding: fills inputs with padding rows, which captures run on.
        profiled: whether the graphs mark the times of their stages.
    """

    def __init__(
        self,
        step: IssueStep,
        memory: GraphMemory,
        fill_padding: Callable[[InputLayout, np.ndarray], None],
        *,
        profiled: bool,
    ) -> None:
        self.step = step
        self.memory = memory
        self.fill_padding = fill_padding
        self.profiled = profiled
        self.captured: dict[InputLayout, CapturedStep] = {}

    def capture(self, layouts: list[InputLayout], *, show_progress: bool) -> None:
        """Captures these steps now, rather than when they are first needed."""
        # The largest first: the others then fit into the pool's memory.
        for layout in tqdm(layouts[::-1], desc="Capturing CUDA graphs", disable=not show_progress):
            self.get(layout)
        # The steps that were run before their captures leave memory in sizes of their own.
        torch.cuda.empty_cache()

    def get(self, layout: InputLayout) -> CapturedStep:
        """The captured step of that layout."""
        if layout not in self.captured:
            self.captured[layout] = self._capture(layout)
        return self.captured[layout]

    def replay(self, layout: InputLayout, host: torch.Tensor) -> CapturedStep:
        """Issues a step of `layout` on the inputs in `host`, int32 [layout.size]."""
        step = self.get(layout)
        self.memory.inputs[: layout.size].copy_(host, non_blocking=True)
        step.graph.replay()
        return step

    def close(self) -> None:
        """Frees the graphs."""
        for step in self.captured.values():
            step.graph.reset()
        self.memory.release(len(self.captured))
        self.captured = {}

    @torch.inference_mode()
    def _capture(self, layout: InputLayout) -> CapturedStep:
        host = np.empty(layout.size, np.int32)
        self.fill_padding(layout, host)
        inputs = self.memory.inputs[: layout.size]
        inputs.copy_(torch.from_numpy(host))
        logits = self.memory.logits[: layout.num_seqs]
        self.step(layout, inputs, logits, None)  # outside: compiles kernels, makes handles
        marks = make_marks(self.memory.device, in_graph=True) if self.profiled else None
        graph = torch.cuda.CUDAGraph()
        with self.memory.capturing(graph):
            self.step(layout, inputs, logits, marks)
        return CapturedStep(graph, marks)
