"""The pipeline's logits are the model's, and its events are exactly those it needs."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.plan import (
    GREEN,
    LANES3,
    MAIN,
    MICROBATCH,
    SEQUENTIAL,
    STREAMS,
    Plan,
    PlannedLane,
    Work,
    list_schedule,
    make_order,
    merge,
    with_events,
)
from nanovllm.layers.attention import AttentionMetadata, PrefillMetadata
from nanovllm.models.stage import MicroBatch, Stage, StepTensors
from tests.checkpoints import Shape
from tests.decode_cases import DecodeCase, relative_error
from tests.simulated_lanes import (
    Memory,
    Recording,
    Tape,
    Wait,
    every_order,
    races,
    simulate,
)

THREE_MICRO_BATCHES = dataclasses.replace(MICROBATCH, micro_batches=3)


def decode(scheduler: PipelineScheduler, inputs: StepTensors) -> torch.Tensor:
    return scheduler.decode_token(inputs.input_ids, inputs.positions, inputs.metadata)


@torch.inference_mode()
def decode_parts(scheduler: PipelineScheduler, parts: list[StepTensors]) -> torch.Tensor:
    """Logits of a step in these micro-batches."""
    batches = [MicroBatch(index, inputs) for index, inputs in enumerate(parts)]
    scheduler.issue(batches)
    return scheduler.model.compute_logits(torch.cat([batch.x for batch in batches]))


@torch.inference_mode()
def plain_forward(case: DecodeCase) -> torch.Tensor:
    model, inputs = case.model, case.step()
    return model.compute_logits(model(inputs.input_ids, inputs.positions, inputs.metadata))


@torch.inference_mode()
def layer_by_layer(case: DecodeCase) -> torch.Tensor:
    """The seed's two calls, alternating over the layers."""
    model, inputs = case.model, case.step()
    hidden = inputs.input_ids
    for layer in range(model.num_layers):
        hidden, residual = model.forward_attention(hidden, inputs.positions, layer, inputs.metadata)
        hidden = model.forward_ffn(hidden, residual, layer)
    return model.compute_logits(hidden)


# The same logits


@pytest.mark.parametrize("seed", range(16))
def test_pipelined_logits_equal_the_sequential_ones(seed):
    count = 2 + seed % 8
    case = DecodeCase(Shape.random(seed), count, seed)
    expected = case.expected_logits()
    assert relative_error(plain_forward(case), expected) < 1e-5
    scheduler = PipelineScheduler(case.model)
    assert relative_error(decode(scheduler, case.step()), expected) < 1e-5
    for sizes in [*([first, count - first] for first in range(1, count)), [1] * count]:
        assert relative_error(decode_parts(scheduler, case.parts(sizes)), expected) < 1e-5, sizes
    three = PipelineScheduler(case.model, THREE_MICRO_BATCHES)
    assert relative_error(decode(three, case.step()), expected) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_alternating_the_stages_is_the_model_to_the_last_bit(seed):
    case = DecodeCase(Shape.random(seed), 5, seed)
    expected = plain_forward(case)
    assert torch.equal(layer_by_layer(case), expected)
    assert torch.equal(decode(PipelineScheduler(case.model, SEQUENTIAL), case.step()), expected)


def test_steps_follow_each_other():
    """Each step reads what the steps before it have stored in the KV cache."""
    case = DecodeCase(Shape(layers=3, seed=4), 5)
    scheduler = PipelineScheduler(case.model)
    for _ in range(20):
        assert relative_error(decode(scheduler, case.step()), case.expected_logits()) < 1e-5
        case.append_tokens()


def test_a_single_sequence_stays_whole():
    case = DecodeCase(Shape(seed=5), 1)
    assert torch.equal(decode(PipelineScheduler(case.model), case.step()), plain_forward(case))


def test_decode_token_without_metadata_runs_whole_sequences():
    case = DecodeCase(Shape(layers=2, seed=6), 5)
    tokens = torch.tensor(list(itertools.chain.from_iterable(case.contexts)))
    positions = torch.cat([torch.arange(len(context)) for context in case.contexts])
    ends = torch.tensor([len(context) for context in case.contexts]).cumsum(0) - 1
    for plan in (SEQUENTIAL, MICROBATCH, THREE_MICRO_BATCHES):
        logits = PipelineScheduler(case.model, plan).decode_token(tokens, positions)
        assert relative_error(logits[ends], case.expected_logits()) < 1e-5


def test_get_statistics_counts_and_times_the_steps():
    case = DecodeCase(Shape(seed=7), 4)
    pipelined, sequential = (PipelineScheduler(case.model, p) for p in (MICROBATCH, SEQUENTIAL))
    for _ in range(3):
        decode(pipelined, case.step())
        decode(sequential, case.step())
    stats = pipelined.get_statistics()
    assert stats["tokens"] == {"pipelined": 12, "sequential": 0}
    assert sequential.get_statistics()["tokens"] == {"pipelined": 0, "sequential": 12}
    assert stats["total_tokens"] == 12
    assert stats["profiled_steps"] == 3
    assert stats["avg_attention_ms"] > 0
    assert stats["avg_ffn_ms"] > 0
    assert stats["avg_total_ms"] >= stats["avg_attention_ms"] + stats["avg_ffn_ms"]
    assert stats["overlap_share"] == 0.0  # the CPU does one thing at a time


def test_a_step_of_one_sequence_is_not_counted_as_pipelined():
    case = DecodeCase(Shape(seed=7), 1)
    scheduler = PipelineScheduler(case.model)
    decode(scheduler, case.step())
    assert scheduler.get_statistics()["tokens"] == {"pipelined": 0, "sequential": 1}


# Bad input


def without_last(name: str) -> Callable[[StepTensors], StepTensors]:
    def shorten(inputs: StepTensors) -> StepTensors:
        if hasattr(inputs, name):
            return dataclasses.replace(inputs, **{name: getattr(inputs, name)[:-1]})
        metadata = inputs.metadata
        if hasattr(metadata, name):
            metadata = dataclasses.replace(metadata, **{name: getattr(metadata, name)[:-1]})
        else:
            field = getattr(metadata.decode, name)[:-1]
            decode = dataclasses.replace(metadata.decode, **{name: field})
            metadata = dataclasses.replace(metadata, decode=decode)
        return dataclasses.replace(inputs, metadata=metadata)

    return shorten


def of_both_kinds(inputs: StepTensors) -> StepTensors:
    m = inputs.metadata
    prefill = PrefillMetadata(m.decode.block_tables, m.decode.context_lens, torch.arange(5), 1)
    metadata = AttentionMetadata(m.slot_mapping, m.decode, prefill)
    return dataclasses.replace(inputs, metadata=metadata)


BAD_INPUTS = {
    "positions": without_last("positions"),
    "metadata.slot_mapping": without_last("slot_mapping"),
    "metadata.block_tables": without_last("block_tables"),
    "input_ids has shape (4,)": without_last("context_lens"),
    "input_ids has shape (1, 4)": lambda inputs: dataclasses.replace(
        inputs, input_ids=inputs.input_ids[None]
    ),
    "input_ids has shape ()": lambda inputs: dataclasses.replace(
        inputs, input_ids=inputs.input_ids[0]
    ),
    "positions must count up from 0": lambda inputs: StepTensors(
        inputs.input_ids[:0], inputs.positions[:0], None
    ),
    "metadata must have decode or prefill, and not both": of_both_kinds,
    "positions must count up": lambda inputs: dataclasses.replace(inputs, metadata=None),
    "positions has shape (3,)": lambda inputs: StepTensors(
        inputs.input_ids, inputs.positions[1:], None
    ),
}


@pytest.mark.parametrize("wrong", BAD_INPUTS)
def test_inputs_that_do_not_fit_each_other_are_a_clear_error(wrong):
    case = DecodeCase(Shape(seed=8), 4)
    case.contexts = [[*context, 7] for context in case.contexts]  # no position is 0
    scheduler = PipelineScheduler(case.model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        decode(scheduler, BAD_INPUTS[wrong](case.step()))
    assert str(caught.value).startswith(wrong)
    assert scheduler.get_statistics()["total_tokens"] == 0
    assert torch.isfinite(decode(scheduler, case.step())).all()


def test_a_stage_without_a_lane_is_a_clear_error():
    plan = dataclasses.replace(MICROBATCH, lanes=(PlannedLane("attention", ("attention",)),))
    case = DecodeCase(Shape(layers=1), 2)
    with pytest.raises(ValueError, match=r"^stage='mlp' has no lane in plan 'microbatch'$"):
        decode(PipelineScheduler(case.model, plan), case.step())


# Orders are data


def names(works: list[Work]) -> list[str]:
    return [
        "".join(f"{stage.name}{stage.layer} " for stage in work.stages) + "ABCD"[work.micro_batch]
        for work in works
        if work.lane != MAIN
    ]


def chain_of(layers: int) -> list[Stage]:
    kinds = ("qkv", "attention", "mlp")
    return [Stage(name, layer, lambda batch: None) for layer in range(layers) for name in kinds]


def test_the_seeds_pipeline_alternates_the_two_lanes():
    order = make_order(chain_of(2), STREAMS, 2)
    assert names(order) == [
        "qkv0 A", "qkv0 B", "attention0 A", "attention0 B", "mlp0 qkv1 A", "mlp0 qkv1 B",
        "attention1 A", "attention1 B", "mlp1 A", "mlp1 B",
    ]  # fmt: skip
    assert sum(work.waits for work in order) == 1 + 4 * 2 + 1
    assert [work.micro_batch for work in order if work.lane == MAIN] == [1]


def test_a_lane_of_its_own_for_qkv_is_pure_data():
    order = make_order(chain_of(2), LANES3, 3)
    lanes = {stage.name: work.lane for work in order for stage in work.stages}
    assert lanes == {"attention": "attention", "mlp": "ffn", "qkv": "qkv"}
    assert names(order)[3:9] == [
        "attention0 A", "attention0 B", "attention0 C", "mlp0 A", "mlp0 B", "mlp0 C"
    ]  # fmt: skip
    assert LANES3.with_sms((36, 80, 16)).name == "lanes3 36+80+16"


def test_list_scheduling_issues_what_can_begin_first():
    """Of lanes with several stages a layer, stage by stage would be serial."""
    lanes = ["attention", "dense", "link", "dense", "link", "dense"] * 8
    times = [64.0, 10, 35, 58, 35, 12] * 8

    def length(turns: list[tuple[int, int]]) -> float:
        free, ready = dict.fromkeys(lanes, 0.0), [0.0] * 3
        for batch, link in turns:
            lane = lanes[link]
            free[lane] = ready[batch] = max(free[lane], ready[batch]) + times[link]
        return max(ready)

    listed = list_schedule(lanes, times, 3)
    stage_by_stage = [(batch, link) for link in range(len(lanes)) for batch in range(3)]
    assert sorted(listed) == sorted(stage_by_stage)
    assert length(listed) < 0.9 * length(stage_by_stage)


def test_the_readme_shows_the_loop_as_it_is():
    loop = textwrap.dedent(inspect.getsource(PipelineScheduler.issue)).rstrip()
    readme = Path(__file__).resolve().parent.parent / "README.md"
    assert f"```python\n{loop}\n```" in readme.read_text(encoding="utf-8")
    assert len(loop.splitlines()) <= 25


# What the events allow gives the same bits, and no event is idle


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


def two_model_steps(
    plan: Plan, sizes: list[int], layers: int = 3, order: list[Work] | None = None
) -> TwoSteps:
    case = DecodeCase(Shape(layers=layers, seed=layers), sum(sizes), seed=layers)
    before, steps = case.cache.clone(), []
    for _ in range(2):
        steps.append(case.parts(sizes))
        case.append_tokens()
    wrong = [case.padding_like(part) for part in steps[0]]
    two = TwoSteps(case.model, plan, steps, wrong, order=order)
    two.reset = lambda: case.cache.copy_(before)
    return two


MODEL_PLANS = pytest.mark.parametrize(
    ("plan", "sizes"),
    [
        (STREAMS, [1, 4]),
        (STREAMS, [3, 2]),
        (GREEN, [4, 1]),
        (STREAMS, [2, 1, 2]),
        (STREAMS, [5]),
        (LANES3, [2, 1, 2]),
        (LANES3, [2, 3]),
        (dataclasses.replace(LANES3, times=(("qkv", 3.0), ("attention", 20.0),
                                            ("mlp", 18.0))), [1, 2, 1, 1]),
    ],
)  # fmt: skip


@MODEL_PLANS
@pytest.mark.parametrize("layers", [1, 3])
def test_each_wait_of_the_models_order_is_needed_and_none_is_missing(plan, sizes, layers):
    two_model_steps(plan, sizes, layers).prove()


@MODEL_PLANS
def test_the_models_steps_give_the_same_bits_in_any_order_that_events_allow(plan, sizes):
    steps = two_model_steps(plan, sizes, layers=2)
    assert all(map(steps.agrees, steps.adversaries()))
    assert all(steps.agrees(random.Random(seed).choice) for seed in range(10))


def test_without_any_one_of_its_waits_the_seeds_pipeline_gives_other_bits():
    steps = two_model_steps(STREAMS, [3, 2])
    tapes = steps.without_each_wait()
    assert len(tapes) == 2 * (1 + 4 * 3 + 1)
    for tape in tapes:
        assert not all(steps.agrees(order, tape) for order in steps.adversaries())


def test_every_order_of_a_step_gives_the_same_bits():
    case = DecodeCase(Shape(layers=2, seed=1), 2)
    before, inputs = case.cache.clone(), case.parts([1, 1])
    recording = Recording(case.model, STREAMS)
    expected = recording.step(inputs)
    orders = list(every_order(recording.tape))
    assert len(orders) > 5
    for order in orders:
        case.cache.copy_(before)
        memory = Memory([case.padding_like(part) for part in inputs])
        turns = iter(order)
        simulate(recording.tape, memory, lambda _, turns=turns: next(turns))
        assert torch.equal(memory.results[0], expected)
        assert order[-1] == MAIN  # the step ends when all of its work has ended


def test_one_micro_batch_has_one_order():
    case = DecodeCase(Shape(layers=2), 3)
    recording = Recording(case.model, STREAMS)
    recording.step(case.parts([3]))
    assert len(list(every_order(recording.tape))) == 1


def test_attention_of_each_runs_beside_the_ffn_of_the_other():
    """In every layer, some orders have the one stage first and some the other."""
    case = DecodeCase(Shape(layers=2), 4)
    recording = Recording(case.model, STREAMS)
    recording.step(case.parts([2, 2]))
    runs = [operation.lane for operation in recording.tape if hasattr(operation, "function")]
    orders = list(every_order(recording.tape))
    for layer in range(2):
        attention = 2 * layer + 1  # of B: its number on the attention lane, from 0
        mlp = 4 + 4 * layer  # of A, on the dense lane: behind embed and qkv of A and B, and so on
        assert runs.count("attention") > attention
        first = set()
        for order in orders:
            turns = {lane: [i for i, o in enumerate(order) if o == lane] for lane in set(order)}
            first.add(turns["attention"][attention] < turns["ffn"][mlp])
        assert first == {True, False}


class ChangedModel:
    """A model with some of its stages replaced."""

    def __init__(self, stages: list[Stage]) -> None:
        self.list = stages

    def stages(self) -> list[Stage]:
        return self.list


def test_the_proof_notices_memory_that_is_freed_too_early():
    case = DecodeCase(Shape(layers=2), 4)

    def hasty(stage: Stage) -> Stage:
        def run(batch: MicroBatch) -> None:
            stage.run(batch)
            batch.q = None  # free for the dense lane, which may be ahead of this one

        return dataclasses.replace(stage, run=run) if stage.name == "attention" else stage

    steps, before = [case.parts([2, 2])] * 2, case.cache.clone()
    two = TwoSteps(ChangedModel([hasty(s) for s in case.model.stages()]), STREAMS, steps,
                   [case.padding_like(part) for part in steps[0]])  # fmt: skip
    two.reset = lambda: case.cache.copy_(before)
    assert races(two.tape)
    assert not all(map(two.agrees, two.adversaries()))


def test_the_proof_notices_a_field_that_two_lanes_write():
    """Were the embedding a part of the first QKV stage, the residual would have two writers."""
    case = DecodeCase(Shape(layers=2), 3)
    embed, qkv, *rest = case.model.stages()

    def both(batch: MicroBatch) -> None:
        embed.run(batch)
        qkv.run(batch)

    steps = [case.parts([1, 1, 1])] * 2
    model = ChangedModel([dataclasses.replace(qkv, run=both), *rest])
    assert races(TwoSteps(model, STREAMS, steps, steps[0]).tape) == []
    assert races(TwoSteps(model, LANES3, steps, steps[0]).tape)


# Random stage lists


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
    times = tuple((kind, rng.random()) for kind in model.kinds) if rng.random() < 0.3 else ()
    return Plan("random", rng.randint(1, 4), tuple(planned), streams=True, times=times)


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


@pytest.mark.parametrize("seed", range(0, 200, 10))
def test_random_orders_need_each_of_their_waits_and_no_other(seed):
    for each in range(seed, seed + 10):
        random_steps(each).prove()


@pytest.mark.parametrize("seed", range(25))
def test_random_orders_give_the_same_bits_however_the_lanes_take_turns(seed):
    steps = random_steps(1000 + seed)
    adversaries = steps.adversaries()
    assert all(map(steps.agrees, adversaries[:24]))
    assert all(steps.agrees(random.Random(turn).choice) for turn in range(5))
