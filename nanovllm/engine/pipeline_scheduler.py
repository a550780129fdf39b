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
from itertools import accumulate, pairwise
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
        sizes: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Runs one decode step eagerly, and times its stages.

        Args:
            input_ids: integer [N], one token per sequence.
            positions: integer [N].
            metadata: where the tokens stand in the KV cache. None: no cache; the tokens are whole
                sequences, each from a position 0 to the next.
            sizes: sequences of each micro-batch; default: as even as may be.

        Returns:
            Logits [N, vocab_size].

        Raises:
            ValueError: inputs or sizes that do not fit each other.
        """
        check(input_ids, positions, metadata)
        # Where sequences begin, in tokens.
        starts = list(range(len(input_ids) + 1))
        if metadata is None:
            starts = [*(positions == 0).nonzero().flatten().tolist(), len(input_ids)]
        sizes = self._sizes(len(starts) - 1, sizes)
        batches: list[MicroBatch] = []
        rest = metadata
        for first, last in pairwise(accumulate(sizes, initial=0)):
            tokens = slice(starts[first], starts[last])
            places = rest
            if rest is not None and last < len(starts) - 1:
                places, rest = rest.split(last - first)
            inputs = StepTensors(input_ids[tokens], positions[tokens], places)
            batches.append(MicroBatch(len(batches), inputs))
        timer = StageTimer(input_ids.device)
        timer.begin_step()
        self.issue(batches, timer)
        logits = self.model.compute_logits(torch.cat([batch.x for batch in batches]))
        timer.end_step()
        if input_ids.is_cuda:
            torch.cuda.current_stream().synchronize()
        self.statistics.count_step(len(input_ids), pipelined=len(batches) > 1)
        self.statistics.add_times(*timer.read())
        return logits

    def get_statistics(self) -> dict[str, object]:
        """Counts and mean times so far; see `PipelineStatistics.as_dict`."""
        return self.statistics.as_dict()

    def _sizes(self, count: int, sizes: Sequence[int] | None) -> Sequence[int]:
        """How many of `count` sequences are in each micro-batch; all in one if they are too few."""
        parts = self.plan.micro_batches
        if sizes is None:
            even = [count // parts + (i < count % parts) for i in range(parts)]
            return even if count >= parts else [count]
        if sum(sizes) != count or min(sizes) < 1:
            raise ValueError(
                f"sizes={list(sizes)} is not allowed for {count} sequences: each must be at least "
                f"1, and together they must be {count}"
            )
        return sizes


def check(
    input_ids: torch.Tensor, positions: torch.Tensor, metadata: DecodeMetadata | None
) -> None:
    """Raises ValueError unless these are inputs of a decode step that fit each other."""
    n = input_ids.numel()
    expected = {"input_ids": (input_ids, (n,)), "positions": (positions, (n,))}
    if isinstance(metadata, DecodeMetadata):
        expected |= {
            "metadata.slot_mapping": (metadata.slot_mapping, (n,)),
            "metadata.block_tables": (metadata.block_tables, (n, *metadata.block_tables.shape[1:])),
            "metadata.context_lens": (metadata.context_lens, (n,)),
            "metadata.tile_offsets": (metadata.tile_offsets, (n + 1,)),
        }
    elif metadata is not None:
        kind = type(metadata).__name__
        raise ValueError(f"metadata must be DecodeMetadata or None, not {kind}")
    for name, (tensor, shape) in expected.items():
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
