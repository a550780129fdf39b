"""Scheduler and block manager in situations made for them: what they do, one thing at a time."""

import random

import pytest

from nanovllm.engine.scheduler import MAX_PREFILL_STREAK
from tests.scheduler_marathon import marathon
from tests.scheduler_world import STORY, World, always, drive, sequence


@pytest.mark.parametrize(("caching", "starts"), [(True, [0, 8, 12]), (False, [0, 0, 0])])
def test_equal_prompts_share_all_full_blocks_but_the_one_with_the_last_token(caching, starts):
    world = World(num_blocks=20, block_size=4, max_num_seqs=4, budget=100, caching=caching)
    for length, start in zip((12, 12, 13), starts, strict=True):
        world.arrive(STORY[:length], max_tokens=1)
        (step,) = drive(world)
        assert (step.chunks[0].start, step.chunks[0].end) == (start, length)


def test_generated_tokens_are_shared_too():
    world = World(num_blocks=20, block_size=4, max_num_seqs=4, budget=100, caching=True)
    first = world.arrive([1, 2, 3], max_tokens=8)
    drive(world)
    world.arrive([*first.token_ids[:9], 3], max_tokens=1)
    (step,) = drive(world)
    assert step.chunks[0].start == 8


def test_cached_blocks_survive_until_others_need_them_and_the_ends_go_first():
    world = World(num_blocks=4, block_size=2, max_num_seqs=1, budget=100, caching=True)
    world.arrive([1, 2, 3, 1, 2, 2], max_tokens=1)
    drive(world)
    world.arrive([3, 3], max_tokens=2)  # takes the never used block and the cached last one
    drive(world)
    world.arrive([1, 2, 3, 1, 2, 2, 1], max_tokens=1)
    (step,) = drive(world)
    assert step.chunks[0].start == 4


def test_a_long_prompt_is_read_in_chunks_and_samples_once():
    world = World(num_blocks=20, block_size=4, max_num_seqs=4, budget=5, caching=True)
    world.arrive(STORY[:12], max_tokens=1)
    steps = drive(world)
    assert [(c.start, c.end, c.needs_sample) for step in steps for c in step.chunks] == [
        (0, 5, False),
        (5, 10, False),
        (10, 12, True),
    ]


def test_the_youngest_is_preempted_and_recomputed_and_the_oldest_never_is():
    world = World(num_blocks=6, block_size=2, max_num_seqs=3, budget=50, caching=False)
    seqs = [world.arrive([1 + i, 2], max_tokens=8) for i in range(3)]
    ends = []
    while world.step(always(1)) is not None:
        assert seqs[0].request_index >= 0 or seqs[0].num_generated == 8
        ends += [s.request_id for s in seqs if s.num_generated == 8 and s.request_id not in ends]
    assert world.scheduler.num_preemptions > 0
    assert ends == [0, 1, 2]


def test_a_prompt_that_fills_all_blocks_runs_alone():
    world = World(num_blocks=3, block_size=2, max_num_seqs=4, budget=50, caching=True)
    seqs = [world.arrive([1, 2, 3, 1, 2, token], max_tokens=4) for token in (1, 2, 3)]
    drive(world)
    assert [seq.finish_reason for seq in seqs] == ["length"] * 3
    assert [seq.num_generated for seq in seqs] == [1] * 3


@pytest.mark.parametrize(
    ("max_tokens", "max_len", "generated"),
    [(4, 99, 4), (4, 7, 4), (4, 5, 2), (4, 4, 1), (4, 3, 1), (4, 2, 1), (1, 99, 1), (1, 3, 1)],
)
def test_a_sequence_ends_at_its_limits_but_not_before_its_first_token(
    max_tokens, max_len, generated
):
    seq = sequence(0, [1, 2, 3], max_tokens, max_len)
    assert not seq.is_full
    while seq.finish_reason is None:
        seq.append(1)
    assert seq.num_generated == generated
    assert seq.finish_reason == "length"
    assert seq.is_full


def test_a_failed_step_is_planned_again():
    world = World(num_blocks=20, block_size=2, max_num_seqs=4, budget=5, caching=True)
    seq = world.arrive([1, 2, 3, 1, 1, 2, 2], max_tokens=3)
    while world.alive:
        world.fail(always(3), ahead=True)
        world.step(always(1))
    assert seq.token_ids == [1, 2, 3, 1, 1, 2, 2, 1, 1, 1]


def test_looking_ahead_goes_on_with_tokens_that_are_not_known_yet():
    world = World(num_blocks=20, block_size=2, max_num_seqs=4, budget=50, caching=True)
    seq = world.arrive([1, 2, 3], max_tokens=3)
    steps = [world.step(always(1), ahead=True) for _ in range(3)]
    assert [(s.chunks[0].start, s.chunks[0].end) for s in steps] == [(0, 3), (3, 4), (4, 5)]
    assert seq.finish_reason == "length"
    assert world.in_flight is None  # nothing was launched beyond max_tokens


def test_looking_ahead_preempts_nobody():
    world = World(num_blocks=3, block_size=2, max_num_seqs=2, budget=50, caching=False)
    for _ in range(2):
        world.arrive([1, 2], max_tokens=2)
    preemptions = []
    while world.alive:
        before = world.scheduler.num_preemptions
        current = world.in_flight or world.launch(always(1))
        planned = world.scheduler.num_preemptions
        world.in_flight = world.launch(always(1), ahead=True)
        assert world.scheduler.num_preemptions == planned
        preemptions.append(planned - before)
        world.finish(current)
    assert sum(preemptions) > 0


def test_a_request_with_a_matcher_skips_the_steps_that_are_launched_ahead():
    world = World(num_blocks=20, block_size=2, max_num_seqs=4, budget=50, caching=True)
    world.arrive([1, 2, 3], max_tokens=6)
    world.arrive([1, 2, 3], max_tokens=3, matched=True)
    while world.alive:
        world.step(always(1), ahead=True)
    launched = [[chunk.seq.request_id for chunk in step.chunks] for step in world.launches]
    assert launched == [[0, 1], [0], [0, 1], [0], [0, 1], [0]]


def test_requests_with_matchers_alone_are_never_computed_ahead():
    world = World(num_blocks=20, block_size=2, max_num_seqs=4, budget=50, caching=True)
    for _ in range(2):
        world.arrive([1, 2, 3], max_tokens=3, matched=True)
    while world.alive:
        world.step(always(1), ahead=True)
        assert world.in_flight is None
    assert len(world.launches) == 3


def test_no_request_starves_beyond_the_prefill_streak_with_look_ahead():
    assert marathon(3000, seed=random.randrange(10**6)) <= MAX_PREFILL_STREAK
