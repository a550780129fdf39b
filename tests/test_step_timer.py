"""Timing a step: when its readings count, and the inputs it runs on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest

from nanovllm.engine.step_inputs import InputLayout
from nanovllm.engine.step_timer import ALIKE, MOST_READINGS, fill_steady, settled_seconds
from nanovllm.layers.attention import HeadShape
from tests.decode_cases import PlanningBackend

# Steps of 1,024 sequences of 519 tokens after a pause, 8B shape on one H200, ms: clocks settle,
# and at the end dip.
SETTLING = [39.4, 40.1, 40.8, 41.4, 41.2, 41.1, 41.3, 41.5, 41.6]
DIPPING = [45.0, 49.9, 47.6, 44.5, 43.2, 42.8, 42.3, 41.9, 41.6, 41.7, 41.8, 41.6, 41.5, 41.5]


def read_from(readings: list[float]) -> tuple[Iterator[float], float]:
    """What is left of the readings after `settled_seconds` had its way, and its result."""
    left = iter(readings)
    return left, settled_seconds(lambda: next(left))


def test_equal_readings_take_no_more_than_they_must() -> None:
    left, seconds = read_from([1.0] * 20)
    assert seconds == 1.0
    assert len(list(left)) == 20 - ALIKE


@pytest.mark.parametrize("skipped", range(len(SETTLING)))
def test_clocks_that_settle_or_dip_do_not_count(skipped: int) -> None:
    _, seconds = read_from((SETTLING + DIPPING)[skipped:])
    assert seconds == pytest.approx(41.5, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_what_never_settles_is_a_median(seed: int) -> None:
    noise = random.Random(seed)
    left, seconds = read_from(
        [noise.choice([0.9, 1.0, 1.0, 1.1]) for _ in range(2 * MOST_READINGS)]
    )
    assert 0.9 <= seconds <= 1.1
    assert len(list(left)) >= MOST_READINGS


@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize(("context", "blocks"), [(1, 10), (256, 8), (1000, 40), (1000, 3)])
def test_made_up_inputs_are_a_steady_batch(context: int, blocks: int, pipelined: bool) -> None:
    backend = PlanningBackend(HeadShape(2, 1, 64))
    layout = InputLayout.decode(6, 5, backend, pipelined)
    flat = np.full(layout.size, -1, np.int32)
    fill_steady(layout, context, blocks, 256, backend, flat)
    views = layout.views(flat)
    used = -(-context // 256)
    tables = views["block_tables"]
    assert (views["context_lens"] == context).all()
    assert (tables[:, :used] >= 1).all()
    assert (tables <= blocks).all()
    if 6 * used <= blocks:
        assert len(np.unique(tables[:, :used])) == 6 * used
    last = context - 1
    slots = tables[:, last // 256] * 256 + last % 256
    assert (views["slot_mapping"] == slots).all()
    assert views["plan"].tolist() == [context] * 6
    assert (flat >= 0).all()
