"""Issues the stages of one step on their lanes; it schedules no requests, as scheduler.py does.

In the pipeline one micro-batch is in attention while another is in the FFN:

    lane        time ->
    attention       A0  B0  A1  B1  A2  B2 ...    A, B: micro-batches; 0, 1, 2: layers
    ffn         A,B     A0  B0  A1  B1  A2 ...    A,B: what comes before attention of layer 0

A step is a list of micro-batches, a layer a list of stages, and each stage has a lane, as a plan
says (engine/plan.py). From these follows the order of issue, a list that `PipelineScheduler.issue`
walks through. With one micro-batch that is sequential execution.

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
from nanovllm.layers.attention import AttentionMetadata, PrefillMetadata
from nanovllm.models.stage import MicroBatch, Model, StepTensors
from nanovllm.models.throwaway_cache import throwaway_cache


class PipelineScheduler:
    """Issues steps of `model`, whose KV cache is bound, as `plan` says."""

    def __init__(
        self,
        model: Model,
        plan: Plan = MICROBATCH,
        streams: Sequence[torch.cuda.Stream] = (),  # of its lanes, in order, if it has streams
        workspace: Any = None,  # scratch memory of attention on its lane
        statistics: PipelineStatistics | None = None,  # of steps run by `decode_token`
        device_sms: int = 0,
    ) -> None:
        self.model, self.plan, self.workspace = model, plan, workspace
        self.statistics = statistics or PipelineStatistics(mode=plan.mode)
        own: Sequence[Any] = streams or [None] * len(plan.lanes)
        self.lanes = {
            lane.name: Lane(stream, lane.sms or device_sms, device_sms)
            for lane, stream in zip(plan.lanes, own, strict=True)
        }
        self.orders: dict[int, list[Work]] = {}  # by number of micro-batches

    def issue(self, batches: Sequence[MicroBatch], timer: StageTimer | None = None) -> None:
        """Issues all layers of all micro-batches between the current stream and itself."""
        main = Lane(torch.cuda.current_stream() if self.plan.streams else None)
        lanes = {MAIN: main, **self.lanes}
        events = [main.record()] * len(batches)  # behind the last work of each
        for work in self.order(len(batches)):
            lane, batch = lanes[work.lane], batches[work.micro_batch]
            if work.waits:
                lane.wait(events[batch.index])
            with lane.use():
                begin = timer.mark() if timer and work.stages else None
                for stage in work.stages:
                    stage.run(batch)
                if timer and begin:
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
    def decode_token(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Runs and times whole sequences, which have no KV cache.

        Kept for the specification, tests/seed_spec.py; the engine calls `issue` instead.

        Args:
            input_ids: integer [T].
            positions: integer [T]; each 0 begins a sequence.

        Returns:
            Logits [T, vocab_size].

        Raises:
            ValueError: inputs that do not fit each other.
        """
        if positions.shape != input_ids.shape:
            raise ValueError(
                f"positions has shape {tuple(positions.shape)}; it must be that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )
        timer = StageTimer(input_ids.device)
        with throwaway_cache(self.model, positions) as metadata:
            parts = split(StepTensors(input_ids, positions, metadata), self.plan.micro_batches)
            batches = [MicroBatch(index, part) for index, part in enumerate(parts)]
            timer.begin_step()
            self.issue(batches, timer)
            logits = self.model.compute_logits(hidden_states(batches))
            timer.end_step()
            if input_ids.is_cuda:
                torch.cuda.current_stream().synchronize()
        self.statistics.count_step(len(input_ids), pipelined=len(batches) > 1)
        self.statistics.add_times(*timer.read())
        return logits

    def get_statistics(self) -> dict[str, object]:
        """Counts and mean times so far; see `PipelineStatistics.as_dict`."""
        return self.statistics.as_dict()


def hidden_states(batches: Sequence[MicroBatch]) -> torch.Tensor:
    """[T, hidden_size] of all micro-batches, once all stages have been issued."""
    parts = [batch.x for batch in batches if batch.x is not None]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def split(inputs: StepTensors, parts: int) -> list[StepTensors]:
    """Micro-batches of a step of prompts, all in one if there are too few of them."""
    rows = inputs.metadata.prefill
    assert rows is not None
    starts, count = rows.cu_seqlens_q.tolist(), len(rows.context_lens)
    if count < parts:
        return [inputs]
    batches = []
    for first, last in pairwise(count * i // parts for i in range(parts + 1)):
        tokens = slice(starts[first], starts[last])
        prefill = PrefillMetadata(
            rows.block_tables[first:last],
            rows.context_lens[first:last],
            rows.cu_seqlens_q[first : last + 1] - starts[first],
            rows.max_seqlen_q,
        )
        places = AttentionMetadata(inputs.metadata.slot_mapping[tokens], prefill=prefill)
        batches.append(StepTensors(inputs.input_ids[tokens], inputs.positions[tokens], places))
    return batches
