"""The attention/FFN pipeline: attention of one micro-batch beside the FFN of the other.

    lane        time ->
    attention   A0  B0  A1  B1  A2  B2 ...        A, B: micro-batches; 0, 1, 2: layers
    ffn             A0  B0  A1  B1  A2  ...

A decode batch is cut into two micro-batches, and layer by layer each stage of the one runs while
the other stage serves the other. Dependencies, each an event, are only these: a stage waits for
the stage before it of the same micro-batch; the first waits for the inputs; the logits wait for
the last. With one micro-batch the same order is sequential execution.

Memory crosses lanes without copies. A tensor is freed when its successor replaces it in the
`MicroBatch`, and the lane that made it replaces it only after waiting for the lane that read it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch

from nanovllm.engine.pipeline_statistics import PipelineStatistics
from nanovllm.engine.stage_executor import Lane, StageExecutor, Work
from nanovllm.engine.stage_marks import StageMarks, make_marks
from nanovllm.engine.step_inputs import check_step, cut_in_two
from nanovllm.layers.attention import AttentionMetadata
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.stage import BEFORE_LAYERS, MicroBatch, Model, StepTensors
from nanovllm.models.throwaway_cache import throwaway_cache


class Cut(ABC):
    """Where a layer is cut into its two stages."""

    #: The lane that the step begins on.
    first: Lane

    def __init__(self, model: Model) -> None:
        self.model = model

    @abstractmethod
    def begin(self, batch: MicroBatch) -> None:
        """What comes before layer 0, on lane `first`."""

    @abstractmethod
    def attention(self, layer: int, batch: MicroBatch) -> None:
        """Attention stage of `layer`."""

    @abstractmethod
    def ffn(self, layer: int, batch: MicroBatch) -> None:
        """FFN stage of `layer`."""


class DenseCut(Cut):
    """Attention is only what reads the KV cache; everything dense is on the other side."""

    first = Lane.FFN

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        self.stages = model.stages()

    def begin(self, batch: MicroBatch) -> None:
        self._run(slice(0, 2), batch)

    def attention(self, layer: int, batch: MicroBatch) -> None:
        self._run(slice(3 * layer + 2, 3 * layer + 3), batch)

    def ffn(self, layer: int, batch: MicroBatch) -> None:
        self._run(slice(3 * layer + 3, 3 * layer + 5), batch)

    def _run(self, which: slice, batch: MicroBatch) -> None:
        for stage in self.stages[which]:
            stage.run(batch)


class SeedCut(Cut):
    """Attention with its norm and projections, then the FFN with its norm.

    The cut of the original specification, slower than the dense one, which the engine uses.
    """

    first = Lane.ATTENTION
    model: Qwen3ForCausalLM

    def begin(self, batch: MicroBatch) -> None:
        batch.x = batch.inputs.input_ids

    def attention(self, layer: int, batch: MicroBatch) -> None:
        inputs = batch.inputs
        batch.attn_out, batch.residual = self.model.forward_attention(
            _made(batch.x), inputs.positions, layer, inputs.metadata
        )

    def ffn(self, layer: int, batch: MicroBatch) -> None:
        batch.x = self.model.forward_ffn(_made(batch.attn_out), _made(batch.residual), layer)


CUTS: dict[str, type[Cut]] = {"dense": DenseCut, "seed": SeedCut}


class PipelineScheduler:
    """Issues decode steps of `model` as a pipeline.

    Args:
        model: the model, its KV cache bound.
        executor: where the stages run.
        statistics: where times of profiled steps and counts go.
        cut: where the stages are cut: "dense" (the faster) or "seed".
        micro_batches: 2; or 1, for sequential execution in the same two stages.
    """

    def __init__(
        self,
        model: Model,
        executor: StageExecutor,
        statistics: PipelineStatistics | None = None,
        cut: str = "dense",
        micro_batches: int = 2,
    ) -> None:
        if micro_batches not in (1, 2):
            raise ValueError(f"micro_batches={micro_batches!r} is not allowed: it must be 1 or 2")
        if cut not in CUTS:
            raise ValueError(f"cut={cut!r} is not allowed: it must be one of {', '.join(CUTS)}")
        self.model = model
        self.executor = executor
        self.statistics = statistics or PipelineStatistics()
        self.cut = CUTS[cut](model)
        self.micro_batches = micro_batches

    @torch.inference_mode()
    def decode_token(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: AttentionMetadata | None = None,
        cut_at: int | None = None,
    ) -> torch.Tensor:
        """Runs one step eagerly, and times its stages.

        Args:
            input_ids: integer [T], in decode one token per sequence.
            positions: integer [T].
            metadata: where the tokens stand in the KV cache, all of sequences that decode, or all
                of prompts. None: the tokens are whole sequences, each from a position 0 to the
                next.
            cut_at: sequences of the first micro-batch; default: half of them, rounded up.

        Returns:
            Logits [T, vocab_size].

        Raises:
            ValueError: inputs that do not fit each other, or a cut that leaves a part empty.
        """
        if metadata is None:
            with throwaway_cache(self.model, positions) as metadata:
                return self.decode_token(input_ids, positions, metadata, cut_at)
        inputs = StepTensors(input_ids, positions, metadata)
        check_step(inputs, self.model.backend)
        parts = [inputs]
        if self.micro_batches > 1:
            parts = cut_in_two(inputs, self.model.backend, cut_at)
        marks = make_marks(input_ids.device)
        marks.begin_step()
        logits = self.model.compute_logits(self.run(parts, marks))
        marks.end_step()
        if input_ids.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.statistics.count_step(len(input_ids), pipelined=len(parts) > 1)
        self.statistics.add_times(*marks.read())
        return logits

    def run(self, parts: list[StepTensors], marks: StageMarks | None = None) -> torch.Tensor:
        """Issues a step between the current stream and itself, by way of the lanes.

        Args:
            parts: its micro-batches, of T tokens together.
            marks: for the times of the stages.

        Returns:
            Hidden states [T, hidden_size] after the final norm.
        """
        batches = [MicroBatch(i, part) for i, part in enumerate(parts)]
        self.issue(batches, marks)
        hidden = [_made(batch.x) for batch in batches]
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def issue(self, batches: list[MicroBatch], marks: StageMarks | None) -> None:
        """Issues all layers of all micro-batches; the main lane then waits for their ends."""
        cut, executor = self.cut, self.executor

        def stage(lane: Lane, layer: int, batch: MicroBatch) -> None:
            function = cut.attention if lane is Lane.ATTENTION else cut.ffn
            made_on, event = reached[batch.index]
            if made_on is not lane:  # a lane works in order, so it never waits for itself
                executor.wait(lane, event)
            executor.run(Work(lane, layer, batch.index), lambda: function(layer, batch), marks)
            reached[batch.index] = lane, executor.record(lane)

        # The lane of the last stage of each micro-batch, and the event behind it.
        reached: dict[int, tuple[Lane, Any]] = {}
        executor.wait(cut.first, executor.record(Lane.MAIN))
        for batch in batches:
            work = Work(cut.first, BEFORE_LAYERS, batch.index)
            executor.run(work, partial(cut.begin, batch), marks)
            reached[batch.index] = cut.first, executor.record(cut.first)
        for layer in range(len(self.model.kv_cache)):
            for lane in (Lane.ATTENTION, Lane.FFN):
                for batch in batches:
                    stage(lane, layer, batch)
        # The FFN lane's last work is the last of all.
        executor.wait(Lane.MAIN, reached[batches[-1].index][1])

    def get_statistics(self) -> dict[str, object]:
        """Counts and mean times so far; see `PipelineStatistics.as_dict`."""
        return self.statistics.as_dict()


def _made(tensor: torch.Tensor | None) -> torch.Tensor:
    """The tensor, which the stage before has made."""
    assert tensor is not None
    return tensor
