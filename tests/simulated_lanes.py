"""A simulated GPU that runs pipelined steps in any order that their events allow.

`Recording` has a `PipelineScheduler` issue steps and writes down what it issues: pieces of work,
events and waits, each on a lane. The host side is the real one, so tensors are replaced in the
micro-batches when their work is *issued*. `simulate` then runs what was written down, one piece of
work at a time, on whichever lane may go on.

Memory is as torch's allocator has it. A tensor has an address on the lane that made it. When the
micro-batches hold it no longer, its address is free for what that lane issues next, though other
lanes may not have read it yet. Each piece of work therefore begins by overwriting all free memory
of its lane with NaN, as its temporaries might. What has not been made yet is NaN as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

import torch

from nanovllm.engine.pipeline_scheduler import Cut, PipelineScheduler
from nanovllm.engine.stage_executor import Lane, StageExecutor, Work
from nanovllm.engine.stage_marks import StageMarks
from nanovllm.engine.step_inputs import cut_in_two
from nanovllm.layers.attention import AttentionMetadata
from nanovllm.models.stage import MicroBatch, StepTensors

FIELDS = ("x", "x_squares", "residual", "q", "attn_out")
INPUT_IDS = -1  # in place of an address: the step's token ids, which no lane has made


@dataclass
class Memory:
    """Contents of the simulated device: the inputs, tensors by address, the result of each step."""

    inputs: StepTensors
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    results: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """A piece of work."""

    lane: Lane
    function: Callable[[Memory], None]


@dataclass(frozen=True)
class Record:
    """An event is complete when its lane comes here."""

    lane: Lane
    event: int


@dataclass(frozen=True)
class Wait:
    """The lane goes on only when the event is complete."""

    lane: Lane
    event: int


Operation = Run | Record | Wait


class Heap:
    """Addresses of tensors, given out and taken back in the order of issue."""

    def __init__(self) -> None:
        self.numbers = count()
        self.free: dict[Lane, list[int]] = defaultdict(list)
        self.shapes: dict[int, torch.Size] = {}
        self.lanes: dict[int, Lane] = {}
        self.held: dict[int, torch.Tensor] = {}  # so that torch does not reuse a storage

    def address(self, tensor: torch.Tensor, lane: Lane) -> tuple[int, bool]:
        """The address of a tensor, and whether it is new because `lane` has just made it."""
        for address, known in self.held.items():
            if known.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return address, False
        fits = [a for a in self.free[lane] if self.shapes[a] == tensor.shape]
        address = fits[-1] if fits else next(self.numbers)
        if fits:
            self.free[lane].remove(address)
        self.shapes[address], self.lanes[address] = tensor.shape, lane
        self.held[address] = tensor
        return address, True

    def keep_only(self, tensors: list[torch.Tensor]) -> None:
        """Frees everything but these."""
        kept = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        for address, tensor in list(self.held.items()):
            if tensor.untyped_storage().data_ptr() not in kept:
                del self.held[address]
                self.free[self.lanes[address]].append(address)

    def load(self, memory: Memory, address: int) -> torch.Tensor:
        """What is at an address, NaN if nothing has been made there yet."""
        return memory.tensors.get(address, torch.full(self.shapes[address], torch.nan)).clone()

    def overwritten(self, lane: Lane) -> dict[int, torch.Tensor]:
        """What the free memory of a lane holds once somebody has used it in between."""
        return {a: torch.full(self.shapes[a], torch.nan) for a in self.free[lane]}


class Recording(StageExecutor):
    """The operations of steps that `scheduler` issues, in the order of issue."""

    def __init__(self, scheduler: PipelineScheduler) -> None:
        self.tape: list[Operation] = []
        self.events = count()
        self.heap = Heap()
        self.batches: dict[int, MicroBatch] = {}
        self.cut = scheduler.cut
        self.scheduler = scheduler
        scheduler.executor, scheduler.cut = self, RecordingCut(scheduler.cut, self)

    @torch.inference_mode()
    def step(self, inputs: StepTensors, cut_at: int | None = None) -> torch.Tensor:
        """Issues a step between two pieces of work of the caller's; returns its hidden states."""

        def fill_inputs(memory: Memory) -> None:
            memory.inputs = inputs

        def read_result(memory: Memory) -> None:
            memory.results.append(torch.cat([self.heap.load(memory, a) for a in addresses]))

        self.split = partial(cut_in_two, backend=self.scheduler.model.backend, cut_at=cut_at)
        if self.scheduler.micro_batches == 1:
            self.split = lambda inputs: [inputs]
        self.tape.append(Run(Lane.MAIN, fill_inputs))
        hidden = self.scheduler.run(self.split(inputs))
        last = [batch.x for batch in self.batches.values()]
        addresses = [self.heap.address(tensor, Lane.MAIN)[0] for tensor in last]
        self.tape.append(Run(Lane.MAIN, read_result))
        self.batches = {}
        self.heap.keep_only([])
        return hidden

    def run(self, work: Work, function: Callable[[], None], marks: StageMarks | None) -> None:
        function()  # comes back to `issue`, by way of `RecordingCut`

    def record(self, lane: Lane) -> int:
        event = next(self.events)
        self.tape.append(Record(lane, event))
        return event

    def wait(self, lane: Lane, event: int) -> None:
        assert any(isinstance(o, Record) and o.event == event for o in self.tape)
        self.tape.append(Wait(lane, event))

    def issue(self, lane: Lane, batch: MicroBatch, stage: Callable[[MicroBatch], None]) -> None:
        """Runs a stage for what the host sees, and writes down how to run it again."""
        self.batches[batch.index] = batch
        overwritten = self.heap.overwritten(lane)
        read = self._addresses(batch, lane)
        stage(batch)
        made = {
            name: self.heap.address(tensor, lane)
            for name, tensor in _tensors(batch).items()
            if tensor is not batch.inputs.input_ids
        }
        written = {name: address for name, (address, new) in made.items() if new}
        self.heap.keep_only([t for b in self.batches.values() for t in _tensors(b).values()])
        index, split = batch.index, self.split

        def again(memory: Memory) -> None:
            memory.tensors.update(overwritten)
            inputs = split(memory.inputs)[index]
            fields = {
                name: inputs.input_ids if address == INPUT_IDS else self.heap.load(memory, address)
                for name, address in read.items()
            }
            copy = MicroBatch(index, inputs, **fields)
            stage(copy)
            for name, address in written.items():
                memory.tensors[address] = getattr(copy, name).clone()

        self.tape.append(Run(lane, again))

    def _addresses(self, batch: MicroBatch, lane: Lane) -> dict[str, int]:
        return {
            name: INPUT_IDS
            if tensor is batch.inputs.input_ids
            else self.heap.address(tensor, lane)[0]
            for name, tensor in _tensors(batch).items()
        }


class RecordingCut(Cut):
    """Tells a `Recording` of every stage."""

    def __init__(self, cut: Cut, recording: Recording) -> None:
        super().__init__(cut.model)
        self.cut, self.recording = cut, recording
        self.first = cut.first

    def begin(self, batch: MicroBatch) -> None:
        self.recording.issue(self.first, batch, self.cut.begin)

    def attention(self, layer: int, batch: MicroBatch) -> None:
        self.recording.issue(Lane.ATTENTION, batch, partial(self.cut.attention, layer))

    def ffn(self, layer: int, batch: MicroBatch) -> None:
        self.recording.issue(Lane.FFN, batch, partial(self.cut.ffn, layer))


class _Lanes:
    """Where each lane stands in what was issued on it."""

    def __init__(self, tape: list[Operation]) -> None:
        self.left = {lane: [o for o in tape if o.lane is lane][::-1] for lane in Lane}
        self.complete: set[int] = set()

    def runnable(self) -> list[Lane]:
        """Lanes whose next operation is a piece of work; passes all events and waits it can."""
        moved = True
        while moved:
            moved = False
            for left in self.left.values():
                while left and not isinstance(left[-1], Run):
                    operation = left[-1]
                    if isinstance(operation, Record):
                        self.complete.add(operation.event)
                    elif operation.event not in self.complete:
                        break
                    left.pop()
                    moved = True
        return [lane for lane, left in self.left.items() if left and isinstance(left[-1], Run)]

    @property
    def done(self) -> bool:
        return not any(self.left.values())


@torch.inference_mode()
def simulate(
    tape: list[Operation], memory: Memory, choose: Callable[[list[Lane]], Lane]
) -> list[Lane]:
    """Runs all of the tape; `choose` says which of several lanes goes on. Returns the order."""
    lanes, order = _Lanes(tape), []
    while runnable := lanes.runnable():
        lane = choose(runnable)
        operation = lanes.left[lane].pop()
        assert isinstance(operation, Run)
        operation.function(memory)
        order.append(lane)
    assert lanes.done, "the lanes wait for each other for ever"
    return order


def every_order(tape: list[Operation]) -> Iterator[list[Lane]]:
    """All orders in which the lanes can take turns."""

    def turns(order: list[Lane]) -> Iterator[list[Lane]]:
        lanes = _Lanes(tape)
        for lane in order:
            assert lane in lanes.runnable()
            lanes.left[lane].pop()
        runnable = lanes.runnable()
        if not runnable:
            yield order
        for lane in runnable:
            yield from turns([*order, lane])

    return turns([])


def padding_like(inputs: StepTensors) -> StepTensors:
    """Inputs of the same shapes that are safe to run but wrong, for before the right ones come."""
    places, zeros = inputs.metadata, torch.zeros_like
    assert places.decode is not None
    decode = replace(
        places.decode,
        block_tables=zeros(places.decode.block_tables),
        context_lens=torch.ones_like(places.decode.context_lens),
    )
    metadata = AttentionMetadata(zeros(places.slot_mapping), decode)
    return StepTensors(zeros(inputs.input_ids), zeros(inputs.positions), metadata)


def _tensors(batch: MicroBatch) -> dict[str, torch.Tensor]:
    fields = {name: getattr(batch, name) for name in FIELDS}
    return {name: tensor for name, tensor in fields.items() if tensor is not None}
