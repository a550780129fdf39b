"""A simulated GPU: what a `PipelineScheduler` issues on its lanes, and what the events allow.

`Recording` has a scheduler issue steps on streams that only write down what comes: runs of stages,
events and waits. The host side is the real one, so tensors are replaced in the micro-batches when
their stages are *issued*. What was written down is then judged in two ways.

- `races` proves it for all orders at once: two operations that touch the same memory, one of them
  writing, must be ordered by lanes and events.
- `simulate` runs it again in a given order, and the results can be compared bit by bit.

Memory is as torch's allocator has it. A tensor has an address on the lane that made it. When no
micro-batch holds it any more, its memory is free for whatever that lane issues next, though other
lanes may not have read it yet: so the lane's next operation overwrites it, with NaN.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils import _pytree as pytree

from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.plan import MAIN, Plan
from nanovllm.models.stage import MicroBatch, Stage

INPUTS = -1  # the address of the step's inputs, which the main lane fills


@dataclass
class Memory:
    """The simulated device: inputs of each micro-batch, tensors by address, results by step."""

    inputs: Sequence[Any]
    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    results: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """An operation that reads and writes memory at these addresses."""

    lane: str
    reads: frozenset[int]
    writes: frozenset[int]
    function: Callable[[Memory], None]


@dataclass(frozen=True)
class Record:
    """An event is complete when its lane comes here."""

    lane: str
    event: int


@dataclass(frozen=True)
class Wait:
    """The lane goes on only when the event is complete."""

    lane: str
    event: int


Tape = list[Run | Record | Wait]


class Recording:
    """The operations of steps of `model` under `plan`, in the order of issue."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self.tape: Tape = []
        self.numbers = count()
        self.addresses: dict[int, int] = {}  # by the place of the storage
        self.made_on: dict[int, str] = {INPUTS: MAIN}
        self.held: list[torch.Tensor] = []  # all there ever were: torch must not reuse a storage
        self.free: dict[str, set[int]] = defaultdict(set)
        self.lane = MAIN
        self.main = self._stream(MAIN)
        stages = [
            Stage(stage.name, stage.layer, partial(self._record, stage)) for stage in model.stages()
        ]
        recorded: Any = SimpleNamespace(stages=lambda: stages)
        streams: list[Any] = [self._stream(lane.name) for lane in plan.lanes]
        self.scheduler = PipelineScheduler(recorded, plan, streams)

    @torch.no_grad()
    def step(self, inputs: Sequence[Any], results: Sequence[str] = ()) -> torch.Tensor:
        """Issues a step between two operations of the caller's.

        Args:
            inputs: of each micro-batch.
            results: the field that each ends with; default: x.

        Returns:
            The results one after the other.
        """

        def fill(memory: Memory) -> None:
            memory.inputs = inputs

        def read(memory: Memory) -> None:
            memory.results.append(torch.cat([self._load(memory, a) for a in read_from]))

        self._run(frozenset(), frozenset([INPUTS]), fill)
        batches = [MicroBatch(i, each) for i, each in enumerate(inputs)]
        with self._on_streams():
            self.scheduler.issue(batches)
        fields = results or ["x"] * len(batches)
        last = [getattr(*pair) for pair in zip(batches, fields, strict=True)]
        read_from = [self.addresses[_place(tensor)] for tensor in last]
        self._run(frozenset(read_from), frozenset(), read)
        for batch in batches:
            self._release(set(self._fields(batch)[1]), set())
        return torch.cat(last)

    def _stream(self, lane: str) -> Any:
        def record() -> int:
            self.tape.append(Record(lane, next(self.numbers)))
            return self.tape[-1].event  # type: ignore[union-attr]

        def wait(event: int) -> None:
            assert any(isinstance(o, Record) and o.event == event for o in self.tape)
            self.tape.append(Wait(lane, event))

        return SimpleNamespace(lane=lane, record_event=record, wait_event=wait)

    @contextmanager
    def _on_streams(self) -> Iterator[None]:
        @contextmanager
        def on(stream: Any) -> Iterator[None]:
            before, self.lane = self.lane, stream.lane
            yield
            self.lane = before

        with (
            mock.patch.object(torch.cuda, "stream", on),
            mock.patch.object(torch.cuda, "current_stream", return_value=self.main),
        ):
            yield

    def _run(
        self, reads: frozenset[int], writes: frozenset[int], function: Callable[[Memory], None]
    ) -> None:
        """Writes down an operation, which also overwrites the memory that is free on its lane."""
        overwritten = frozenset(self.free.pop(self.lane, ()))

        def run(memory: Memory) -> None:
            for address in overwritten:
                memory.tensors.pop(address, None)  # which reads as NaN
            function(memory)

        self.tape.append(Run(self.lane, reads, writes | overwritten, run))

    def _record(self, stage: Stage, batch: MicroBatch) -> None:
        """Runs a stage for what the host sees, and writes down how to run it again."""
        before, old = self._fields(batch)
        values = {address: self.held[address].clone() for address in old}
        stage.run(batch)
        after, new = self._fields(batch)
        changed = {a for a, value in values.items() if not torch.equal(value, self.held[a])}
        writes = (set(new) - set(old)) | changed
        index = batch.index

        def again(memory: Memory) -> None:
            copy = MicroBatch(index, memory.inputs[index])
            for name, (addresses, spec) in before.items():
                leaves = [a if a is None else self._load(memory, a) for a in addresses]
                setattr(copy, name, pytree.tree_unflatten(leaves, spec))
            stage.run(copy)
            for name, (addresses, _) in after.items():
                leaves = pytree.tree_leaves(getattr(copy, name))
                for address, tensor in zip(addresses, leaves, strict=True):
                    if address in writes:
                        memory.tensors[address] = tensor.clone()

        self._run(frozenset(old) | {INPUTS}, frozenset(writes), again)
        self._release(set(old), set(new))

    def _fields(self, batch: MicroBatch) -> tuple[dict[str, tuple[list[Any], Any]], list[int]]:
        """Addresses of what a micro-batch holds, by field and all together."""
        fields, known = {}, []
        for name, value in vars(batch).items():
            if name in ("index", "inputs") or value is None:
                continue
            leaves, spec = pytree.tree_flatten(value)
            addresses = [self._address(x) if isinstance(x, torch.Tensor) else None for x in leaves]
            fields[name] = addresses, spec
            known += [address for address in addresses if address is not None]
        return fields, known

    def _address(self, tensor: torch.Tensor) -> int:
        place = _place(tensor)
        if place not in self.addresses:
            self.addresses[place] = len(self.held)
            self.made_on[len(self.held)] = self.lane
            self.held.append(tensor)
        return self.addresses[place]

    def _release(self, old: set[int], new: set[int]) -> None:
        for address in old - new:
            self.free[self.made_on[address]].add(address)

    def _load(self, memory: Memory, address: int) -> torch.Tensor:
        """What is at an address, NaN if nothing has been made there yet."""
        missing = torch.full_like(self.held[address], torch.nan)
        return memory.tensors.get(address, missing).clone()


def done_before(tape: Tape) -> list[int]:
    """By operation, the set (as bits) of those that lanes and events have complete before it."""
    known: dict[str, int] = defaultdict(int)
    at_event: dict[int, int] = {}
    found = []
    for i, operation in enumerate(tape):
        lane = operation.lane
        found.append(known[lane])
        if isinstance(operation, Record):
            at_event[operation.event] = known[lane]
        elif isinstance(operation, Wait):
            known[lane] |= at_event[operation.event]
        known[lane] |= 1 << i
    return found


def races(tape: Tape) -> list[tuple[int, int]]:
    """Pairs of operations that touch the same memory, one of them writing, and are not ordered."""
    done = done_before(tape)
    writers: dict[int, int] = {}
    readers: dict[int, list[int]] = defaultdict(list)
    found = []
    for i, operation in enumerate(tape):
        if isinstance(operation, Run):
            before = [writers[a] for a in operation.reads | operation.writes if a in writers]
            for address in operation.writes:
                before += readers.pop(address, [])
                writers[address] = i
            for address in operation.reads - operation.writes:
                readers[address].append(i)
            found += [(j, i) for j in before if not done[i] >> j & 1]
    return found


@torch.no_grad()
def simulate(tape: Tape, memory: Memory, choose: Callable[[list[str]], str]) -> None:
    """Runs all of the tape; `choose` says which of several lanes goes on."""
    left: dict[str, list[Any]] = defaultdict(list)  # by lane, the next one last
    for operation in tape[::-1]:
        left[operation.lane].append(operation)
    complete: set[int] = set()
    while runnable := _runnable(left, complete):
        left[choose(runnable)].pop().function(memory)
    assert not any(left.values()), "the lanes wait for each other for ever"


def _runnable(lanes: dict[str, list[Any]], complete: set[int]) -> list[str]:
    """Lanes whose next operation is a run; passes all events and waits it can."""
    moved = True
    while moved:
        moved = False
        for left in lanes.values():
            while left and not isinstance(left[-1], Run):
                if isinstance(left[-1], Record):
                    complete.add(left[-1].event)
                elif left[-1].event not in complete:
                    break
                left.pop()
                moved = True
    return sorted(lane for lane, left in lanes.items() if left and isinstance(left[-1], Run))


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
