"""How long arms are measured, and in which order."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise, permutations
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import LLM
from nanovllm.bench import sweep
from nanovllm.bench.arms import ArmSpec
from nanovllm.bench.compare import FEWEST_ROUNDS, gather, in_order, run_turns
from nanovllm.bench.sweep import FEWEST_STEPS, MOST_STEPS, plan_turns
from nanovllm.bench.workload import EDGE_STEPS, DecodeWorkload, fill_cache


class TestTurns:
    def test_slow_steps_are_few(self) -> None:
        assert plan_turns(0.03, 0.3, 4) == (FEWEST_STEPS + 2 * EDGE_STEPS, FEWEST_ROUNDS)

    def test_fast_steps_are_many_but_not_too_many(self) -> None:
        assert plan_turns(0.0005, 0.3, 2) == (MOST_STEPS + 2 * EDGE_STEPS, 10)

    def test_between_them_a_turn_of_the_fastest_arm_takes_a_tenth_of_a_second(self) -> None:
        assert plan_turns(0.005, 0.9, 2) == (20 + 2 * EDGE_STEPS, 10)

    @pytest.mark.parametrize("seed", range(20))
    def test_rounds_fill_the_time_and_are_balanced(self, seed: int) -> None:
        rng = random.Random(seed)
        step, seconds = rng.uniform(0.0002, 0.05), rng.uniform(0.01, 3)
        count = rng.randrange(1, 8)
        output, rounds = plan_turns(step, seconds, count)
        assert rounds >= FEWEST_ROUNDS
        assert rounds * (output - 2 * EDGE_STEPS) * step >= seconds * 0.999
        arms: Any = range(count)
        orders = [in_order(arms, number) for number in range(rounds)]
        followed = Counter(pair for order in orders for pair in pairwise(order))
        assert followed.keys() == {*permutations(arms, 2)}
        assert len({*followed.values()}) <= 1

    def test_arms_take_turns_back_and_forth_beginning_with_each(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []

        def arm(label: str) -> Any:
            return SimpleNamespace(label=label, activate=lambda: order.append(label))

        monkeypatch.setattr("nanovllm.bench.compare.run_turn", lambda *_: [1.0, 3.0])
        runner = SimpleNamespace(model_config=SimpleNamespace(vocab_size=9))
        engine: Any = SimpleNamespace(model_runner=runner)
        arms, workload = [arm(label) for label in "abc"], DecodeWorkload(2, 3, 5)
        times = gather(run_turns(engine, arms, workload, 7))
        assert order == [*"abccbabcaacbcabbacabc"]
        assert {label: t.count for label, t in times.items()} == dict.fromkeys("abc", 14)
        assert times["a"].median == 2

    @pytest.mark.parametrize("count", range(1, 8))
    def test_every_arm_has_every_place_equally_often(self, count: int) -> None:
        arms: Any = range(count)
        rounds = [in_order(arms, number) for number in range(2 * count)]
        for places in zip(*rounds, strict=True):
            assert sorted(places) == sorted([*arms, *arms])

    @pytest.mark.parametrize("rounds", [2, 4, 6])
    def test_a_steady_drift_is_the_same_for_all(self, rounds: int) -> None:
        arms: Any = range(5)
        turns = [arm for number in range(rounds) for arm in in_order(arms, number)]
        moments = [sum(i for i, arm in enumerate(turns) if arm == one) for one in arms]
        assert len(set(moments)) == 1

    def test_a_point_leaves_nothing_behind(self) -> None:
        workload = DecodeWorkload(batch=4, context=300, output=sweep.LONGEST_OUTPUT)
        with LLM(
            device="cpu", num_kvcache_blocks=workload.blocks(256), enable_prefix_caching=False
        ) as engine:
            fill_cache(engine)
            arms = [ArmSpec("sequential")]
            with sweep.open_arms(engine, arms) as opened:
                bar: Any = SimpleNamespace(set_postfix_str=lambda text: None, update=lambda: None)
                point = sweep.measure_point(engine, opened, 4, 300, 0.001, bar)
            assert point["arms"]["sequential"]["steps"] == FEWEST_ROUNDS * FEWEST_STEPS
            assert engine.is_finished()
            assert engine.scheduler.num_preemptions == 0
            assert len(engine.scheduler.blocks.free) == engine.model_runner.num_blocks
