"""Runs decode steps: pipelined or sequential, from CUDA graphs or eagerly, profiled or not.

All ways issue the same stages through a `PipelineScheduler`; they differ in its executor, and in
whether what is issued is captured. Which way a step goes is written in its layout, before its
inputs are filled, because a pipelined step spreads its sequences over two micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.cuda_graphs import DecodeGraphs, GraphMemory
from nanovllm.engine.pipeline import Pipeline
from nanovllm.engine.stage_marks import StageMarks, make_marks
from nanovllm.engine.step_inputs import InputLayout, StepTensors, micro_batch_rows
from nanovllm.models.qwen3 import Qwen3ForCausalLM


@dataclass(frozen=True)
class DecodeStep:
    """How one decode step runs: the layout of its inputs, and the row of each sequence.

    `rows` is None where the sequences are the first rows in order.
    """

    layout: InputLayout
    rows: np.ndarray | None


class DecodeRunner:
    """The decode side of a `ModelRunner`.

    Args:
        config: pipeline_enable_profiling is looked up at every step.
        model: the model, its KV cache bound.
        pipeline: see `build_pipeline`.
        last_tokens: the last token of each seat, on the device.
        workspace: attention's scratch memory on all SMs.
        memory: for CUDA graphs; None: run eagerly.
        fill_padding: fills inputs with padding rows.
        max_blocks: width of the block tables.
    """

    def __init__(
        self,
        config: Config,
        model: Qwen3ForCausalLM,
        pipeline: Pipeline,
        last_tokens: torch.Tensor,
        workspace: Any,
        memory: GraphMemory | None,
        fill_padding: Callable[[InputLayout, np.ndarray], None],
        max_blocks: int,
    ) -> None:
        self.config = config
        self.model = model
        self.pipeline = pipeline
        self.last_tokens = last_tokens
        self.workspace = workspace
        self.memory = memory
        self.fill_padding = fill_padding
        self.max_blocks = max_blocks
        self.graphs: dict[bool, DecodeGraphs] = {}  # by whether they are profiled
        self.marks: StageMarks | None = None  # of the last step

    @property
    def graph_sizes(self) -> list[int]:
        """Batch sizes that there are graphs for; none where steps run eagerly."""
        return [] if self.memory is None else self.memory.sizes

    def prepare(self, context_lens: np.ndarray) -> DecodeStep:
        """How a step will run.

        Args:
            context_lens: int [N], tokens of each sequence.
        """
        count = len(context_lens)
        return self.prepare_size(
            context_lens, count if self.memory is None else self.memory.size_for(count)
        )

    def prepare_size(self, context_lens: np.ndarray, size: int) -> DecodeStep:
        """The same, with padding to `size` sequences."""
        layout = self.layout(size)
        return DecodeStep(
            layout, micro_batch_rows(context_lens, size) if layout.pipelined else None
        )

    def layout(self, size: int) -> InputLayout:
        """The layout of a step of `size` sequences, padding included."""
        return InputLayout.decode(size, self.max_blocks, self.pipeline.pipelines(size))

    def capture(self, *, show_progress: bool, sizes: list[int] | None = None) -> None:
        """Captures the graphs of these batch sizes (default: all), each in the way it will run."""
        if self.memory is not None:
            layouts = [self.layout(size) for size in sizes or self.memory.sizes]
            self._graphs().capture(layouts, show_progress=show_progress)

    def run(self, step: DecodeStep, flat: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Issues a step on the host's inputs; returns logits [num_seqs, vocab_size]."""
        layout = step.layout
        if self.memory is not None:
            self.marks = self._graphs().replay(layout, flat).marks
            return self.memory.logits[: layout.num_seqs]
        self.marks = make_marks(device) if self.config.pipeline_enable_profiling else None
        inputs = flat.to(device, non_blocking=True)
        return self._issue(layout, inputs, None, self.marks)

    def run_padding(self, size: int, device: torch.device) -> torch.Tensor:
        """Issues a step of `size` sequences, all of them padding."""
        layout = self.layout(size)
        host = np.empty(layout.size, np.int32)
        self.fill_padding(layout, host)
        return self.run(DecodeStep(layout, None), torch.from_numpy(host), device)

    def finish(self, step: DecodeStep, num_seqs: int) -> None:
        """Adds the last step, which must be complete, to the statistics."""
        self.pipeline.statistics.count_step(num_seqs, pipelined=step.layout.pipelined)
        if self.marks is not None:
            self.pipeline.statistics.add_times(*self.marks.read())

    def close(self) -> None:
        """Frees the graphs, then the partitions that they are bound to; may be called twice."""
        for graphs in self.graphs.values():
            graphs.close()
        self.graphs = {}
        self.pipeline.close()

    def _graphs(self) -> DecodeGraphs:
        profiled = self.config.pipeline_enable_profiling
        if profiled not in self.graphs:
            assert self.memory is not None
            self.graphs[profiled] = DecodeGraphs(
                self._issue, self.memory, self.fill_padding, profiled=profiled
            )
        return self.graphs[profiled]

    def _issue(
        self,
        layout: InputLayout,
        inputs: torch.Tensor,
        logits: torch.Tensor | None,
        marks: StageMarks | None,
    ) -> torch.Tensor:
        """Issues the layers and the output head; returns logits, in `logits` if it is given."""
        if marks is not None:
            marks.begin_step()
        pipeline = self.pipeline
        if layout.pipelined:
            assert pipeline.scheduler is not None
            scheduler, workspace = pipeline.scheduler, pipeline.workspace
        else:
            scheduler, workspace = pipeline.sequential, self.workspace
        tensors = StepTensors.of(layout, inputs, self.last_tokens, workspace)
        hidden = scheduler.run(tensors, marks=marks)
        if tensors.sample_rows is not None:
            hidden = hidden[tensors.sample_rows]
        logits = self.model.compute_logits(hidden, logits)
        if marks is not None:
            marks.end_step()
        return logits
