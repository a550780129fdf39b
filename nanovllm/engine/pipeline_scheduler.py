"""The pipeline: while one micro-batch is in attention, another is in the FFN.

    lane        time ->
    attention       A0  B0  A1  B1  A2  B2 ...    A, B: micro-batches; 0, 1, 2: layers
    ffn         A,B     A0  B0  A1  B1  A2 ...    A,B: what comes before attention of layer 0

A step is a list of micro-batches, a layer a list of stages, and each stage has a lane, as a plan
says (engine/plan.py). The order of issue is a list made of both; `PipelineScheduler.issue` walks
through it. With one micro-batch that is sequential execution.

Memory crosses lanes without copies. A tensor is freed when its successor replaces it in the
`MicroBatch`. That is the work of the stage that made it, one layer on: on the same lane, and after
all stages between, for each of them has waited for the one before. So whoever gets the freed memory
on that lane, comes after every reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from nanovllm.engine.lane import Lane
from nanovllm.engine.pipeline_statistics import PipelineStatistics
from nanovllm.engine.plan import MAIN, MICROBATCH, Plan, Work, make_order
from nanovllm.engine.stage_times import StageTimer
from nanovllm.engine.step_inputs import StepTensors
from nanovllm.layers.attention import DecodeMetadata
from nanovllm.models.stage import MicroBatch, Model


class PipelineScheduler:
    """Issues steps of `model` as a plan says.

    Args:
        model: its KV cache is bound.
        plan: the plan.
        streams: of the plan's lanes, in order; none, where it has no streams.
        workspace: scratch memory of attention on its lane.
        statistics: of steps run by `decode_token`.
        device_sms: SMs of the device.
    """

    def __init__(
        self,
        model: Model,
        plan: Plan = MICROBATCH,
        streams: Sequence[torch.cuda.Stream] = (),
        workspace: Any = None,
        statistics: PipelineStatistics | None = None,
        device_sms: int = 0,
    ) -> None:
        self.model = model
        self.plan = plan
        self.workspace = workspace
        self.statistics = statistics or PipelineStatistics(mode=plan.mode)
        own: Sequence[Any] = streams or [None] * len(plan.lanes)
        self.lanes = {
            lane.name: Lane(lane.name, stream, lane.sms, device_sms)
            for lane, stream in zip(plan.lanes, own, strict=True)
        }
        self.orders: dict[int, list[Work]] = {}  # by number of micro-batches

    def issue(self, batches: Sequence[MicroBatch], timer: StageTimer | None = None) -> None:
        """Issues all layers of all micro-batches between the current stream and itself."""
        main = Lane(MAIN, torch.cuda.current_stream() if self.plan.streams else None)
        lanes = {MAIN: main, **self.lanes}
        events = [main.record()] * len(batches)  # behind the last work of each
        for work in self.order(len(batches)):
            lane, batch = lanes[work.lane], batches[work.micro_batch]
            if work.waits:
                lane.wait(events[batch.index])
            with lane.use():
                begin = timer and timer.mark()
                for stage in work.stages:
                    stage.run(batch)
                if timer and work.stages:
                    timer.add(work, begin)
            if work.records:
                events[batch.index] = lane.record()

    def order(self, micro_batches: int) -> list[Work]:
        """The order of a step of so many micro-batches."""
        if micro_batches not in self.orders:
            stages = self.model.stages()
            self.orders[micro_batches] = make_order(stages, self.plan, micro_batches)
        return self.orders[micro_batches]

    @torch.inference_mode()
    def decode_token(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: DecodeMetadata | None = None,
    ) -> torch.Tensor:
        """Runs one decode step eagerly, and times its stages.

        Args:
            input_ids: integer [N], one token per sequence.
            positions: integer [N].
            metadata: where the tokens stand in the KV cache. None: no cache; the tokens are whole
                sequences, each from a position 0 to the next.

        Returns:
            Logits [N, vocab_size].

        Raises:
            ValueError: inputs that do not fit each other.
        """
        check(input_ids, positions, metadata)
        starts: Sequence[int] = range(len(input_ids) + 1)  # of sequences, in tokens
        if metadata is None:
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(input_ids)]
        count = len(starts) - 1
        parts = self.plan.micro_batches if count >= self.plan.micro_batches else 1
        batches: list[MicroBatch] = []
        for index in range(parts):
            first, last = count * index // parts, count * (index + 1) // parts
            places, metadata = metadata, None
            if places is not None and index < parts - 1:
                places, metadata = places.split(last - first)
            tokens = slice(starts[first], starts[last])
            inputs = StepTensors(input_ids[tokens], positions[tokens], places)
            batches.append(MicroBatch(index, inputs))
        timer = StageTimer(input_ids.device)
        timer.begin_step()
        self.issue(batches, timer)
        logits = self.model.compute_logits(torch.cat([batch.x for batch in batches]))
        timer.end_step()
        if input_ids.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.statistics.count_step(len(input_ids), pipelined=parts > 1)
        self.statistics.add_times(*timer.read())
        return logits

    def get_statistics(self) -> dict[str, object]:
        """Counts and mean times so far; see `PipelineStatistics.as_dict`."""
        return self.statistics.as_dict()


def check(input_ids: torch.Tensor, positions: torch.Tensor, metadata: Any) -> None:
    """Raises ValueError unless these are inputs of a decode step that fit each other."""
    n = input_ids.numel()
    fields = {"input_ids": input_ids, "positions": positions}
    if isinstance(metadata, DecodeMetadata):
        names = ("slot_mapping", "block_tables", "context_lens", "tile_offsets")
        fields |= {f"metadata.{name}": getattr(metadata, name) for name in names}
    elif metadata is not None:
        kind = type(metadata).__name__
        raise ValueError(f"metadata must be DecodeMetadata or None, not {kind}")
    for name, tensor in fields.items():
        width = tensor.shape[1:] if name == "metadata.block_tables" else ()
        shape = (n + (name == "metadata.tile_offsets"), *width)
        if tuple(tensor.shape) != shape or not n:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; for {n} tokens it must be {shape}, "
                "and there must be at least one token"
            )
    counted = [-1, *positions.tolist()] if metadata is None else []
    if any(position not in (0, before + 1) for before, position in pairwise(counted)):
        raise ValueError(
            "positions must count up from 0 in each sequence where there is no metadata to "
            "say what the KV cache holds"
        )
