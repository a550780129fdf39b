"""Two steps of a model or of random stages on simulated lanes, and the proof of their events."""

import dataclasses
import itertools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from nanovllm.engine.plan import Plan, PlannedLane, Work, merge, with_events
from nanovllm.models.stage import MicroBatch, Stage
from tests.simulated_lanes import Memory, Recording, Tape, Wait, races, simulate


class TwoSteps:
    """The recorded issue of two steps, and the results that they should give."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        steps: list[list[Any]],
        wrong: list[Any],
        results: list[str] | None = None,
        order: list[Work] | None = None,
    ) -> None:
        recording = Recording(model, plan)
        if order is not None:
            works = [dataclasses.replace(work, stages=self._recorded(recording, work.stages))
                     for work in order]  # fmt: skip
            recording.scheduler.orders[len(steps[0])] = with_events(works)
        self.tape, self.wrong = recording.tape, wrong
        self.expected = [recording.step(inputs, results or ()) for inputs in steps]
        self.reset: Callable[[], object] = lambda: None

    @staticmethod
    def _recorded(recording: Recording, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        known = {(s.name, s.layer): s for s in recording.scheduler.model.stages()}
        return tuple(known[stage.name, stage.layer] for stage in stages)

    def agrees(self, choose: Callable[[list[str]], str], tape: Tape | None = None) -> bool:
        """Whether the simulated device gives the same bits if the lanes take turns like that."""
        self.reset()
        memory = Memory(self.wrong)
        simulate(self.tape if tape is None else tape, memory, choose)
        return all(map(torch.equal, memory.results, self.expected))

    def adversaries(self) -> list[Callable[[list[str]], str]]:
        """For every order of the lanes, always the first of them goes on that can."""
        lanes = sorted({operation.lane for operation in self.tape})
        return [lambda runnable, lanes=lanes: min(runnable, key=lanes.index)
                for lanes in itertools.permutations(lanes)]  # fmt: skip

    def without_each_wait(self) -> list[Tape]:
        waits = [i for i, operation in enumerate(self.tape) if isinstance(operation, Wait)]
        return [self.tape[:i] + self.tape[i + 1 :] for i in waits]

    def prove(self) -> None:
        """No two operations race, and without any one of the waits some do."""
        assert races(self.tape) == []
        for tape in self.without_each_wait():
            assert races(tape)


class RandomModel:
    """Stages that mix what some of the stages before them made; each writes a field of its own."""

    def __init__(self, rng: random.Random) -> None:
        self.kinds = [f"s{i}" for i in range(rng.randint(2, 6))]
        self.list: list[Stage] = []
        for layer in range(rng.randint(1, 3)):
            # The list may differ from layer to layer.
            for kind in [k for k in self.kinds if layer == 0 or rng.random() < 0.8]:
                last = self.list[-1].name if self.list else None
                others = [k for k in self.kinds if rng.random() < 0.4]
                self.list.append(Stage(kind, layer, self._stage(kind, last, others, rng.random())))

    @staticmethod
    def _stage(
        kind: str, last: str | None, others: list[str], factor: float
    ) -> Callable[[MicroBatch], None]:
        def run(batch: MicroBatch) -> None:
            total = batch.inputs.value * factor
            for name in {last, *others} - {None}:
                field = getattr(batch, str(name), None)
                total = total if field is None else total * 0.7 + field
            setattr(batch, kind, total.sin())

        return run

    def stages(self) -> list[Stage]:
        return self.list


def random_plan(rng: random.Random, model: RandomModel) -> Plan:
    """1 to 4 lanes, each with some of the stages, and 1 to 4 micro-batches."""
    count = rng.randint(1, 4)
    lanes: list[list[str]] = [[] for _ in range(count)]
    for kind in model.kinds:
        rng.choice(lanes).append(kind)
    planned = [PlannedLane(f"lane{i}", tuple(kinds)) for i, kinds in enumerate(lanes) if kinds]
    return Plan("random", rng.randint(1, 4), tuple(planned), streams=True)


def random_order(rng: random.Random, model: RandomModel, plan: Plan) -> list[Work]:
    """Any topological order, in which some micro-batches may end early."""
    left = {}
    for batch in range(plan.micro_batches):
        chain = merge(model.stages(), plan)
        left[batch] = chain[: rng.choice([len(chain), rng.randint(1, len(chain))])]
    works = []
    while left:
        batch = rng.choice(list(left))
        works.append(Work(left[batch][0][0], batch, left[batch].pop(0)[1]))
        if not left[batch]:
            del left[batch]
    return works


def random_steps(seed: int) -> TwoSteps:
    rng = random.Random(seed)
    model = RandomModel(rng)
    plan = random_plan(rng, model)
    # Sometimes the plan's own order.
    order = random_order(rng, model, plan) if rng.random() < 0.7 else None
    ends = {work.micro_batch: work.stages[-1].name for work in order or ()}
    results = [ends.get(batch, model.stages()[-1].name) for batch in range(plan.micro_batches)]
    torch.manual_seed(seed)
    steps = [
        [SimpleNamespace(value=torch.randn(3)) for _ in range(plan.micro_batches)] for _ in range(2)
    ]
    wrong = [SimpleNamespace(value=torch.zeros(3))] * plan.micro_batches
    return TwoSteps(model, plan, steps, wrong, results, order)
