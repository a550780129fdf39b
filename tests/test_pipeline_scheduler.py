"""The pipeline's logits are the model's, and its events are exactly those it needs."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch

from nanovllm.engine.pipeline_scheduler import CUTS, DenseCut, PipelineScheduler
from nanovllm.engine.stage_executor import InlineExecutor, Lane
from nanovllm.models.stage import MicroBatch, StepTensors
from tests.checkpoints import Shape
from tests.decode_cases import DecodeCase, relative_error
from tests.simulated_lanes import (
    Memory,
    Operation,
    Recording,
    Wait,
    every_order,
    padding_like,
    simulate,
)

Choose = Callable[[list[Lane]], Lane]
both_cuts = pytest.mark.parametrize("cut", CUTS)


def scheduler_for(
    case: DecodeCase, cut: str = "dense", micro_batches: int = 2
) -> PipelineScheduler:
    return PipelineScheduler(case.model, InlineExecutor(), cut=cut, micro_batches=micro_batches)


def decode(scheduler: PipelineScheduler, inputs: StepTensors, cut_at: int | None = None):
    return scheduler.decode_token(inputs.input_ids, inputs.positions, inputs.metadata, cut_at)


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
    for cut in CUTS:
        scheduler = scheduler_for(case, cut)
        for cut_at in [None, *range(1, count)]:
            assert relative_error(decode(scheduler, case.step(), cut_at), expected) < 1e-5, cut_at


@pytest.mark.parametrize("seed", range(6))
def test_alternating_the_stages_is_the_model_to_the_last_bit(seed):
    case = DecodeCase(Shape.random(seed), 5, seed)
    expected = plain_forward(case)
    assert torch.equal(layer_by_layer(case), expected)
    for cut in CUTS:
        assert torch.equal(decode(scheduler_for(case, cut, micro_batches=1), case.step()), expected)


@both_cuts
def test_steps_follow_each_other(cut):
    """Each step reads what the steps before it have stored in the KV cache."""
    case = DecodeCase(Shape(layers=3, seed=4), 5)
    scheduler = scheduler_for(case, cut)
    for _ in range(20):
        assert relative_error(decode(scheduler, case.step()), case.expected_logits()) < 1e-5
        case.append_tokens()


@both_cuts
def test_a_single_sequence_stays_whole(cut):
    case = DecodeCase(Shape(seed=5), 1)
    assert torch.equal(decode(scheduler_for(case, cut), case.step()), plain_forward(case))


@both_cuts
def test_decode_token_without_metadata_runs_whole_sequences(cut):
    case = DecodeCase(Shape(layers=2, seed=6), 5)
    tokens = torch.tensor(list(itertools.chain.from_iterable(case.contexts)))
    positions = torch.cat([torch.arange(len(context)) for context in case.contexts])
    ends = torch.tensor([len(context) for context in case.contexts]).cumsum(0) - 1
    for cut_at in (None, 1, 4):
        logits = scheduler_for(case, cut).decode_token(tokens, positions, cut_at=cut_at)
        assert relative_error(logits[ends], case.expected_logits()) < 1e-5


def test_get_statistics_counts_and_times_the_steps():
    case = DecodeCase(Shape(seed=7), 4)
    pipelined, sequential = scheduler_for(case), scheduler_for(case, micro_batches=1)
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
    scheduler = scheduler_for(case)
    decode(scheduler, case.step())
    assert scheduler.get_statistics()["tokens"] == {"pipelined": 0, "sequential": 1}


# Bad input


def without_last(path: str) -> Callable[[StepTensors], StepTensors]:
    def shorten(part, names):
        name, *rest = names
        field = getattr(part, name)
        return dataclasses.replace(part, **{name: shorten(field, rest) if rest else field[:-1]})

    return lambda inputs: shorten(inputs, path.split("."))


def with_a_plan(inputs: StepTensors) -> StepTensors:
    """One that the back end has not made."""
    decode = dataclasses.replace(inputs.metadata.decode, plan=torch.zeros(3, dtype=torch.int32))
    metadata = dataclasses.replace(inputs.metadata, decode=decode)
    return dataclasses.replace(inputs, metadata=metadata)


BAD_INPUTS = {
    "positions": without_last("positions"),
    "metadata.slot_mapping": without_last("metadata.slot_mapping"),
    "metadata.decode.context_lens": without_last("metadata.decode.context_lens"),
    "metadata.decode.block_tables": without_last("metadata.decode.block_tables"),
    "metadata.decode.plan": with_a_plan,
    "input_ids": lambda inputs: dataclasses.replace(inputs, input_ids=inputs.input_ids[None]),
    "input_ids has shape ()": lambda inputs: dataclasses.replace(
        inputs, input_ids=inputs.input_ids[0]
    ),
    "input_ids has shape (0,)": lambda inputs: dataclasses.replace(
        inputs, input_ids=inputs.input_ids[:0], positions=inputs.positions[:0]
    ),
    "positions must count up": lambda inputs: dataclasses.replace(inputs, metadata=None),
}


@pytest.mark.parametrize("wrong", BAD_INPUTS)
def test_inputs_that_do_not_fit_each_other_are_a_clear_error(wrong):
    case = DecodeCase(Shape(seed=8), 4)
    case.contexts = [[*context, 7] for context in case.contexts]  # no position is 0
    scheduler = scheduler_for(case)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        decode(scheduler, BAD_INPUTS[wrong](case.step()))
    assert str(caught.value).startswith(wrong)
    assert scheduler.get_statistics()["total_tokens"] == 0
    assert torch.isfinite(decode(scheduler, case.step())).all()


@pytest.mark.parametrize("cut_at", [-1, 0, 4, 5])
@both_cuts
def test_a_cut_that_leaves_a_part_empty_is_a_clear_error(cut, cut_at):
    case = DecodeCase(Shape(seed=9), 4)
    scheduler = scheduler_for(case, cut)
    expected = decode(scheduler, case.step())
    with pytest.raises(ValueError, match=rf"^cut_at={cut_at} .* it must be from 1 to 3$"):
        decode(scheduler, case.step(), cut_at)
    assert torch.equal(decode(scheduler, case.step()), expected)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"cut": "diagonal"}, "cut='diagonal' is not allowed: it must be one of dense, seed"),
        ({"micro_batches": 0}, "micro_batches=0 is not allowed: it must be 1 or 2"),
        ({"micro_batches": 3}, "micro_batches=3 is not allowed: it must be 1 or 2"),
    ],
)
def test_unknown_cuts_and_micro_batches_are_clear_errors(option, message):
    case = DecodeCase(Shape(layers=1), 1)
    with pytest.raises(ValueError, match=f"^{message}$"):
        PipelineScheduler(case.model, InlineExecutor(), **option)


# The order of the work: whatever the events allow gives the same bits, and no event is idle


class TwoSteps:
    """The recorded issue of two steps, and the hidden states that they should give."""

    def __init__(self, scheduler: PipelineScheduler, case: DecodeCase, cut_at: int | None = None):
        self.cache, self.before = case.cache, case.cache.clone()
        recording = Recording(scheduler)
        self.tape = recording.tape
        self.before_inputs = padding_like(case.step())
        self.expected = [recording.step(case.step(), cut_at)]
        case.append_tokens()
        self.expected.append(recording.step(case.step(), cut_at))

    def agrees(self, choose: Choose, tape: list[Operation] | None = None) -> bool:
        """Whether the simulated device gives the same bits if the lanes take turns like that."""
        self.cache.copy_(self.before)
        memory = Memory(self.before_inputs)
        simulate(self.tape if tape is None else tape, memory, choose)
        return all(map(torch.equal, memory.results, self.expected))

    def without_each_wait(self) -> Iterator[list[Operation]]:
        for i, operation in enumerate(self.tape):
            if isinstance(operation, Wait):
                yield self.tape[:i] + self.tape[i + 1 :]


def two_steps(cut: str, *, cut_at: int | None = None, layers: int = 3) -> TwoSteps:
    case = DecodeCase(Shape(layers=layers, seed=layers), 5, seed=layers)
    return TwoSteps(scheduler_for(case, cut), case, cut_at)


def preferring(lanes: tuple[Lane, ...]) -> Choose:
    """Always lets the first of `lanes` go on that can: the others are as late as possible."""
    return lambda runnable: min(runnable, key=lanes.index)


ADVERSARIES = [preferring(lanes) for lanes in itertools.permutations(Lane)]


@both_cuts
@pytest.mark.parametrize("cut_at", [1, 3, 4])
def test_adversarial_orders_give_the_same_bits(cut, cut_at):
    steps = two_steps(cut, cut_at=cut_at)
    assert all(map(steps.agrees, ADVERSARIES))


@both_cuts
@pytest.mark.parametrize("seed", range(25))
def test_random_orders_give_the_same_bits(cut, seed):
    assert two_steps(cut, layers=2).agrees(random.Random(seed).choice)


@both_cuts
def test_every_order_of_a_step_gives_the_same_bits(cut):
    case = DecodeCase(Shape(layers=2, seed=1), 2)
    before, inputs = case.cache.clone(), case.step()
    recording = Recording(scheduler_for(case, cut))
    expected = recording.step(inputs)
    orders = list(every_order(recording.tape))
    assert len(orders) > 5
    for order in orders:
        case.cache.copy_(before)
        memory, turns = Memory(padding_like(inputs)), iter(order)
        simulate(recording.tape, memory, lambda _, turns=turns: next(turns))
        assert torch.equal(memory.results[0], expected)
        assert order[-1] is Lane.MAIN  # the step ends when all of its work has ended


@both_cuts
@pytest.mark.parametrize("layers", [1, 3])
def test_each_wait_is_needed(cut, layers):
    steps = two_steps(cut, layers=layers)
    tapes = list(steps.without_each_wait())
    assert len(tapes) == 2 * (1 + 4 * layers + 1 - (2 if cut == "seed" else 0))
    for tape in tapes:
        assert not all(steps.agrees(order, tape) for order in ADVERSARIES)


@both_cuts
def test_one_micro_batch_has_one_order(cut):
    case = DecodeCase(Shape(layers=2), 3)
    recording = Recording(scheduler_for(case, cut, micro_batches=1))
    recording.step(case.step())
    assert len(list(every_order(recording.tape))) == 1


@both_cuts
def test_attention_of_each_runs_beside_the_ffn_of_the_other(cut):
    """In every layer, some orders have the one stage first and some the other."""
    case = DecodeCase(Shape(layers=3), 4)
    recording = Recording(scheduler_for(case, cut))
    recording.step(case.step())
    for layer in range(3):
        attention = 2 * layer + 1  # of B: its number on the attention lane, from 0
        ffn = 2 * layer  # of A
        attention += 2 * (cut == "seed")  # there the lane begins the two micro-batches
        ffn += 2 * (cut == "dense")
        first = set()
        for order in every_order(recording.tape):
            turns = {lane: [i for i, o in enumerate(order) if o is lane] for lane in Lane}
            first.add(turns[Lane.ATTENTION][attention] < turns[Lane.FFN][ffn])
        assert first == {True, False}


def test_the_simulation_notices_memory_that_is_freed_too_early():
    class Hasty(DenseCut):
        def attention(self, layer: int, batch: MicroBatch) -> None:
            super().attention(layer, batch)
            batch.q = None  # free for the FFN lane, which may be ahead of this one

    case = DecodeCase(Shape(layers=2), 4)
    scheduler = scheduler_for(case)
    scheduler.cut = Hasty(case.model)
    steps = TwoSteps(scheduler, case)
    assert not all(map(steps.agrees, ADVERSARIES))
