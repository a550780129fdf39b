"""The pipeline's logits are the model's, and its events are exactly those it needs."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.plan import GREEN, LANES3, MICROBATCH, SEQUENTIAL, STREAMS, Plan, Work
from nanovllm.models.stage import MicroBatch, Stage, StepTensors
from tests.checkpoints import Shape
from tests.decode_cases import DecodeCase, relative_error, run
from tests.simulated_lanes import Recording, Run, done_before, races
from tests.two_steps import TwoSteps, random_steps

THREE_MICRO_BATCHES = dataclasses.replace(MICROBATCH, micro_batches=3)


@torch.inference_mode()
def decode_parts(scheduler: PipelineScheduler, parts: list[StepTensors]) -> torch.Tensor:
    """Logits of a step in these micro-batches."""
    batches = [MicroBatch(index, inputs) for index, inputs in enumerate(parts)]
    scheduler.issue(batches)
    return scheduler.model.compute_logits(torch.cat([batch.x for batch in batches]))


@torch.inference_mode()
def plain_forward(case: DecodeCase) -> torch.Tensor:
    return case.model.compute_logits(run(case.model, case.step()))


# The same logits


@pytest.mark.parametrize("seed", range(16))
def test_pipelined_logits_equal_the_sequential_ones(seed):
    count = 2 + seed % 8
    case = DecodeCase(Shape.random(seed), count, seed)
    expected = case.expected_logits()
    assert relative_error(plain_forward(case), expected) < 1e-5
    scheduler = PipelineScheduler(case.model)
    for sizes in [*([first, count - first] for first in range(1, count)), [1] * count]:
        assert relative_error(decode_parts(scheduler, case.parts(sizes)), expected) < 1e-5, sizes


@pytest.mark.parametrize("seed", range(6))
def test_alternating_the_stages_is_the_model_to_the_last_bit(seed):
    case = DecodeCase(Shape.random(seed), 5, seed)
    logits = decode_parts(PipelineScheduler(case.model), [case.step()])
    assert torch.equal(logits, plain_forward(case))


def test_steps_follow_each_other():
    """Each step reads what the steps before it have stored in the KV cache."""
    case = DecodeCase(Shape(layers=3, seed=4), 5)
    scheduler = PipelineScheduler(case.model)
    for _ in range(20):
        logits = decode_parts(scheduler, case.parts([2, 3]))
        assert relative_error(logits, case.expected_logits()) < 1e-5
        case.append_tokens()


@pytest.mark.parametrize("plan", [SEQUENTIAL, MICROBATCH, THREE_MICRO_BATCHES])
def test_decode_token_runs_times_and_counts_whole_sequences(plan):
    case = DecodeCase(Shape(layers=2, seed=6), 5)
    tokens, positions = case.whole()
    ends = (positions == 0).nonzero().flatten()[1:].tolist()
    scheduler = PipelineScheduler(case.model, plan)
    for _ in range(3):
        logits = scheduler.decode_token(tokens, positions)
        last = logits[[end - 1 for end in [*ends, len(tokens)]]]
        assert relative_error(last, case.expected_logits()) < 1e-5
    stats, path = scheduler.get_statistics(), "sequential" if plan is SEQUENTIAL else "pipelined"
    assert stats["tokens"] == {"pipelined": 0, "sequential": 0} | {path: 3 * len(tokens)}
    assert stats["profiled_steps"] == 3
    assert min(stats["avg_attention_ms"], stats["avg_ffn_ms"]) > 0
    assert stats["avg_total_ms"] >= stats["avg_attention_ms"] + stats["avg_ffn_ms"]
    assert stats["overlap_share"] == 0.0  # the CPU does one thing at a time


def test_a_single_sequence_stays_whole():
    case = DecodeCase(Shape(seed=5), 1)
    tokens, positions = case.whole()
    scheduler = PipelineScheduler(case.model)
    with torch.inference_mode():
        expected = case.model.compute_logits(case.model(tokens, positions))
    assert torch.equal(scheduler.decode_token(tokens, positions), expected)
    assert scheduler.get_statistics()["tokens"] == {"pipelined": 0, "sequential": len(tokens)}


@pytest.mark.parametrize(
    ("tokens", "positions", "error"),
    [
        ([5, 6, 7], [0, 1], r"^positions has shape \(2,\).*that of input_ids, \(3,\)"),
        ([[5, 6, 7]], [0, 1, 2], r"^positions has shape \(3,\)"),
        ([[5, 6, 7]], [[0, 1, 2]], "^positions must count up from 0"),
        ([5, 6, 7], [1, 2, 3], "^positions must count up from 0"),
        ([], [], "^positions must count up from 0"),
    ],
)
def test_inputs_that_do_not_fit_each_other_are_a_clear_error(tokens, positions, error):
    scheduler = PipelineScheduler(DecodeCase(Shape(seed=8), 4).model)
    with pytest.raises(ValueError, match=error):
        scheduler.decode_token(torch.tensor(tokens), torch.tensor(positions))
    assert scheduler.get_statistics()["total_tokens"] == 0


# What the events allow gives the same bits, and no event is idle


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
        (LANES3, [1, 2, 1, 1]),
    ],
)


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


def test_attention_of_each_runs_beside_the_ffn_of_the_other():
    """In every layer, neither has to be complete before the other."""
    case = DecodeCase(Shape(layers=2), 4)
    recording = Recording(case.model, STREAMS)
    recording.step(case.parts([2, 2]))
    done = done_before(recording.tape)
    runs = {
        lane: [i for i, o in enumerate(recording.tape) if isinstance(o, Run) and o.lane == lane]
        for lane in ("attention", "ffn")
    }
    for layer in range(2):
        attention = runs["attention"][2 * layer + 1]  # of B
        mlp = runs["ffn"][4 + 4 * layer]  # of A: behind embed and qkv of A and B, and so on
        assert not done[attention] >> mlp & 1
        assert not done[mlp] >> attention & 1


def test_the_proof_notices_memory_that_is_freed_too_early():
    case = DecodeCase(Shape(layers=2), 4)

    def hasty(stage: Stage) -> Stage:
        def run(batch: MicroBatch) -> None:
            stage.run(batch)
            batch.q = None  # free for the dense lane, which may be ahead of this one

        return dataclasses.replace(stage, run=run) if stage.name == "attention" else stage

    steps, before = [case.parts([2, 2])] * 2, case.cache.clone()
    stages = [hasty(stage) for stage in case.model.stages()]
    wrong = [case.padding_like(part) for part in steps[0]]
    two = TwoSteps(SimpleNamespace(stages=lambda: stages), STREAMS, steps, wrong)
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
    model = SimpleNamespace(stages=lambda: [dataclasses.replace(qkv, run=both), *rest])
    assert races(TwoSteps(model, STREAMS, steps, steps[0]).tape) == []
    assert races(TwoSteps(model, LANES3, steps, steps[0]).tape)


# Random stage lists


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
