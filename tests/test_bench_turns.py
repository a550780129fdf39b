"""How long arms are measured, and in which order."""

import math
import random
from collections import Counter
from itertools import pairwise, permutations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanovllm.bench.gain_map import FEWEST_STEPS, MOST_STEPS, plan_turns
from nanovllm.bench.turns import (
    EDGE_STEPS,
    FEWEST_ROUNDS,
    Turn,
    in_order,
    measure,
    step_times,
)


def test_slow_steps_are_few_and_fast_ones_many_but_not_too_many():
    assert plan_turns(0.03, 0.3, 4) == (FEWEST_STEPS + 2 * EDGE_STEPS, FEWEST_ROUNDS)
    assert plan_turns(0.0005, 0.3, 2) == (MOST_STEPS + 2 * EDGE_STEPS, 10)
    assert plan_turns(0.005, 0.9, 2) == (20 + 2 * EDGE_STEPS, 10)


@pytest.mark.parametrize("seed", range(20))
def test_rounds_fill_the_time_and_are_balanced(seed):
    rng = random.Random(seed)
    step, seconds = rng.uniform(0.0002, 0.05), rng.uniform(0.01, 3)
    count = rng.randrange(1, 8)
    output, rounds = plan_turns(step, seconds, count)
    assert rounds >= FEWEST_ROUNDS
    assert rounds % math.lcm(2, count) == 0
    assert rounds * (output - 2 * EDGE_STEPS) * step >= seconds * 0.999


@pytest.mark.parametrize("count", range(1, 8))
def test_within_a_block_all_arms_are_alike(count):
    """Each follows every other equally often, and has every place equally often."""
    arms = range(count)
    orders = [in_order(arms, number) for number in range(math.lcm(2, count))]
    followed = Counter(pair for order in orders for pair in pairwise(order))
    assert followed.keys() == {*permutations(arms, 2)}
    assert len({*followed.values()}) <= 1
    for places in zip(*orders, strict=True):
        assert len({*Counter(places).values()}) == 1


@pytest.mark.parametrize("rounds", [2, 4, 6])
def test_a_steady_drift_is_the_same_for_all(rounds):
    turns = [arm for number in range(rounds) for arm in in_order(range(5), number)]
    moments = [sum(i for i, arm in enumerate(turns) if arm == one) for one in range(5)]
    assert len(set(moments)) == 1


def test_times_are_quartiles_of_all_turns_of_an_arm():
    seconds = [random.uniform(0.001, 0.1) for _ in range(37)]
    arms: list[Any] = [SimpleNamespace(label=label) for label in "ab"]
    turns = [Turn(arms[0], seconds[:9], 0.0), Turn(arms[1], [1.0], 0.0)]
    times = step_times([*turns, Turn(arms[0], seconds[9:], 0.0)])
    assert [times[label]["steps"] for label in "ab"] == [37, 1]
    quartiles = [times["a"]["step_ms"][name] for name in ("q1", "median", "q3")]
    assert quartiles == pytest.approx(list(np.percentile(seconds, [25, 50, 75]) * 1e3))


def test_every_round_is_handed_out(monkeypatch):
    arms: list[Any] = [SimpleNamespace(label=label) for label in "abc"]
    monkeypatch.setattr(
        "nanovllm.bench.turns.run_turns",
        lambda engine, arms, workloads, rounds: (Turn(a, [1.0], 0.0) for a in [*arms] * rounds),
    )
    found = [len(turns) for turns in measure(None, arms, None, seconds=7.0)]  # type: ignore[arg-type]
    assert found == [3 * i for i in range(1, 13)]
