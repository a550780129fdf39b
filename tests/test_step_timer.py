"""Timing a step: when its readings count, and the sequences it runs on."""

import random
from collections.abc import Iterator

import pytest

from nanovllm.engine.auto.step_timer import ALIKE, MOST_READINGS, settled_seconds, steady_chunks

# Steps of 1,024 sequences of 519 tokens after a pause, 8B shape on one H200, ms: clocks settle,
# and at the end dip.
SETTLING = [39.4, 40.1, 40.8, 41.4, 41.2, 41.1, 41.3, 41.5, 41.6]
DIPPING = [45.0, 49.9, 47.6, 44.5, 43.2, 42.8, 42.3, 41.9, 41.6, 41.7, 41.8, 41.6, 41.5, 41.5]


def read_from(readings: list[float]) -> tuple[Iterator[float], float]:
    """What is left of the readings after `settled_seconds` had its way, and its result."""
    left = iter(readings)
    return left, settled_seconds(lambda: next(left))


def test_equal_readings_take_no_more_than_they_must():
    left, seconds = read_from([1.0] * 20)
    assert seconds == 1.0
    assert len(list(left)) == 20 - ALIKE


@pytest.mark.parametrize("skipped", range(len(SETTLING)))
def test_clocks_that_settle_or_dip_do_not_count(skipped):
    _, seconds = read_from((SETTLING + DIPPING)[skipped:])
    assert seconds == pytest.approx(41.5, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_what_never_settles_is_a_median(seed):
    noise = random.Random(seed)
    left, seconds = read_from(
        [noise.choice([0.9, 1.0, 1.0, 1.1]) for _ in range(2 * MOST_READINGS)]
    )
    assert 0.9 <= seconds <= 1.1
    assert len(list(left)) >= MOST_READINGS


@pytest.mark.parametrize(("context", "blocks"), [(1, 10), (256, 8), (1000, 40), (1000, 3)])
def test_made_up_sequences_are_a_steady_batch(context, blocks):
    chunks = list(steady_chunks(6, context, blocks, 256))
    assert [(chunk.start, chunk.end) for chunk in chunks] == [(context - 1, context)] * 6
    assert all(chunk.needs_sample for chunk in chunks)
    used = -(-context // 256)
    tables = [chunk.seq.block_table for chunk in chunks]
    assert {len(table) for table in tables} == {used}
    held = [block for table in tables for block in table]
    assert 1 <= min(held) <= max(held) <= blocks
    if 6 * used <= blocks:
        assert len(set(held)) == 6 * used
