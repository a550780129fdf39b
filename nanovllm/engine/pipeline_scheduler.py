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
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nanovllm.engine.pipeline_statistics import PipelineStatistics
from nanovllm.engine.stage_executor import Lane, StageExecutor, Work
from nanovllm.engine.stage_marks import StageMarks, make_marks
from nanovllm.engine.step_inputs import StepTensors
from nanovllm.layers.attention import DecodeMetadata
from nanovllm.models.qwen3 import Qwen3ForCausalLM

# Layer number of the work before the first layer, in timelines.
BEFORE_LAYERS = -1


@dataclass
class MicroBatch:
    """A part of the batch on its way through the layers.

    `hidden` is what the FFN stage made and attention reads (under the dense cut, queries),
    `attended` what attention made and the FFN reads.
    """

    index: int
    inputs: StepTensors
    hidden: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    residual: torch.Tensor | None = None


class Cut(ABC):
    """Where a layer is cut into its two stages."""

    #: The lane that the step begins on.
    first: Lane

    def __init__(self, model: Qwen3ForCausalLM) -> None:
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

    def begin(self, batch: MicroBatch) -> None:
        inputs = batch.inputs
        batch.hidden, batch.residual = self.model.model.begin(
            inputs.input_ids, inputs.positions, inputs.metadata
        )

    def attention(self, layer: int, batch: MicroBatch) -> None:
        inputs = batch.inputs
        batch.attended = self.model.model.attend(
            layer, _made(batch.hidden), inputs.positions, inputs.metadata
        )

    def ffn(self, layer: int, batch: MicroBatch) -> None:
        inputs = batch.inputs
        batch.hidden, batch.residual = self.model.model.dense(
            layer,
            _made(batch.attended),
            _made(batch.residual),
            inputs.positions,
            inputs.metadata,
        )


class SeedCut(Cut):
    """Attention with its norm and projections, then the FFN with its norm.

    The cut of the original specification, slower than the dense one, which the engine uses.
    """

    first = Lane.ATTENTION

    def begin(self, batch: MicroBatch) -> None:
        batch.hidden = batch.inputs.input_ids

    def attention(self, layer: int, batch: MicroBatch) -> None:
        inputs = batch.inputs
        batch.attended, batch.residual = self.model.forward_attention(
            _made(batch.hidden), inputs.positions, layer, inputs.metadata
        )

    def ffn(self, layer: int, batch: MicroBatch) -> None:
        batch.hidden = self.model.forward_ffn(_made(batch.attended), _made(batch.residual), layer)


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
        model: Qwen3ForCausalLM,
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
        metadata: DecodeMetadata | None = None,
        cut_at: int | None = None,
    ) -> torch.Tensor:
        """Runs one decode step eagerly, and times its stages.

        Args:
            input_ids: integer [N], one token per sequence.
            positions: integer [N].
            metadata: where the tokens stand in the KV cache. None: no cache; the tokens are whole
                sequences, each from a position 0 to the next.
            cut_at: sequences of the first micro-batch; default: half of them, rounded up.

        Returns:
            Logits [N, vocab_size].

        Raises:
            ValueError: inputs that do not fit each other, or a cut that leaves a part empty.
        """
        inputs = StepTensors(input_ids, positions, metadata)
        inputs.check()
        parts = self._split(inputs, cut_at)
        marks = make_marks(input_ids.device)
        marks.begin_step()
        logits = self.model.compute_logits(self._run_parts(parts, marks))
        marks.end_step()
        if input_ids.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.statistics.count_step(len(input_ids), pipelined=len(parts) > 1)
        self.statistics.add_times(*marks.read())
        return logits

    def run(
        self, inputs: StepTensors, cut_at: int | None = None, marks: StageMarks | None = None
    ) -> torch.Tensor:
        """Issues a step between the current stream and itself, by way of the lanes.

        Args:
            inputs: of N sequences.
            cut_at: sequences of the first micro-batch; default: half of them, rounded up.
            marks: for the times of the stages.

        Returns:
            Hidden states [N, hidden_size] after the final norm.
        """
        return self._run_parts(self._split(inputs, cut_at), marks)

    def _split(self, inputs: StepTensors, cut_at: int | None) -> list[StepTensors]:
        return inputs.split(cut_at) if self.micro_batches > 1 else [inputs]

    def _run_parts(self, parts: list[StepTensors], marks: StageMarks | None) -> torch.Tensor:
        batches = [MicroBatch(i, part) for i, part in enumerate(parts)]
        self.issue(batches, marks)
        hidden = [_made(batch.hidden) for batch in batches]
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
        for layer in range(self.model.num_layers):
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
