"""The planner: what it chooses and when it changes, by hand-made tables and on measured GPUs."""

import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.auto.cost_table import CostTable
from nanovllm.engine.auto.planner import PATIENCE, Planner
from nanovllm.engine.plan import GREEN, SEQUENTIAL, STREAMS
from tests.measured_map import measured_shapes
from tests.simulated_gpu import SILLY, Gpu, drive, random_run

PLANS = [SEQUENTIAL, STREAMS, GREEN.with_sms((36, 96))]


def planner_of(times: dict[int, list[tuple[int, float]]]) -> Planner:
    """Of plans measured for 8 sequences: tokens and seconds of each."""
    table = CostTable()
    for plan, samples in times.items():
        for tokens, seconds in samples:
            table.add(plan, 8, tokens, seconds)
    return Planner(table, PLANS, [[4, 8, 16], [8], [8, 16]])


class TestChoice:
    def test_is_among_graphs_that_exist_and_are_measured(self):
        table = CostTable()
        for plan, size, seconds in ((0, 8, 4.0), (0, 64, 4.0), (1, 16, 1.0), (1, 32, 1.0)):
            table.add(plan, size, 1, seconds)
        planner = Planner(table, PLANS, [[8, 64, 128], [8, 32, 64], []])

        # The pipeline is measured for 16 to 32, and nothing for more than 64.
        for num_seqs, plan, size, seconds in ((3, 0, 8, 4.0), (32, 1, 32, 1.0), (33, 0, 64, 4.0)):
            assert planner.choose(num_seqs, 100) == (plan, size, (plan, size, seconds, 4.0))
        assert planner.choose(65, 100) == (0, 128, None)

    def test_without_a_table_is_sequential(self):
        planner = Planner(CostTable(), PLANS[:1], [[1, 2, 4]])
        assert planner.choose(3, 300) == (0, 4, None)

    def test_a_pipeline_must_gain_1_percent_to_be_entered_and_leaves_when_it_loses(self):
        planner = planner_of({
            0: [(0, 1.00), (1000, 1.00)],
            1: [(0, 0.993), (100, 0.98), (200, 0.98), (300, 0.995), (400, 1.005), (500, 1.5)],
        })  # fmt: skip
        tokens = (0, 0, 100, 200, 300, 400, 300, 200)
        assert [planner.choose(8, t).plan for t in tokens] == [0, 0, 1, 1, 1, 0, 0, 1]
        assert planner.switches == 3

    def test_a_plan_must_gain_1_percent_over_the_one_in_use(self):
        planner = planner_of({
            0: [(0, 2.0)],
            1: [(0, 1.00), (300, 1.00)],
            2: [(0, 1.10), (100, 0.995), (200, 0.98), (300, 1.005)],
        })  # fmt: skip
        assert [planner.choose(8, t).plan for t in (0, 100, 200, 300)] == [1, 1, 2, 2]

    def test_what_is_in_use_is_left_where_it_has_no_graph(self):
        planner = planner_of({0: [(0, 2.0)], 1: [(0, 1.0)]})
        assert [planner.choose(n, 0).plan for n in (8, 9)] == [1, 0]


class TestGuard:
    def test_a_plan_slower_than_sequential_for_long_is_dropped_at_that_size(self, caplog):
        planner = planner_of({0: [(0, 1.0)], 1: [(0, 0.9)], 2: [(0, 0.95)]})
        with caplog.at_level(logging.WARNING):
            for _ in range(PATIENCE):
                choice = planner.choose(8, 0)
                assert choice.plan == 1
                planner.observe(choice.prediction, 1.001)
            assert {planner.choose(8, 0).plan for _ in range(100)} == {2}
        (message,) = caplog.messages
        assert "streams is dropped for batches of 8" in message
        assert planner.as_dict()["dropped"] == [["streams", 8]]
        assert "streams: dropped for batches of 8, too slow" in planner.lines()
        # What was launched before it was dropped may be measured after it.
        planner.observe(choice.prediction, 1.001)
        assert len(planner.dropped) == 1

    def test_one_fast_step_in_between_keeps_it(self):
        planner = planner_of({0: [(0, 1.0)], 1: [(0, 0.9)], 2: [(0, 0.95)]})
        for number in range(10 * PATIENCE):
            planner.observe(planner.choose(8, 0).prediction, 1.5 if number % PATIENCE else 0.99)
        assert planner.current == 1
        assert not planner.dropped

    def test_each_size_has_a_count_of_its_own(self):
        table = CostTable()
        for size in (4, 8):
            table.add(0, size, 0, 1.0)
            table.add(1, size, 0, 0.9)
        planner = Planner(table, PLANS[:2], [[4, 8], [4, 8]])
        for number in range(PATIENCE):  # the last one is of another size
            num_seqs = 8 if number < PATIENCE - 1 else 4
            planner.observe(planner.choose(num_seqs, 0).prediction, 1.5)
        assert not planner.dropped
        for num_seqs in (8, 4):
            for _ in range(PATIENCE):
                planner.observe(planner.choose(num_seqs, 0).prediction, 1.5)
            assert planner.choose(num_seqs, 0).plan == 0
        assert planner.dropped == {(1, 4), (1, 8)}

    def test_sequential_steps_are_never_dropped(self):
        planner = planner_of({0: [(0, 1.0)], 1: [(0, 1.1)]})
        for _ in range(3 * PATIENCE):
            planner.observe(planner.choose(8, 0).prediction, 9.9)
        assert planner.current == 0
        assert not planner.dropped

    def test_dips_of_the_clocks_drop_nothing(self):
        gpu = Gpu()
        planner = gpu.planner()
        run = drive(planner, gpu, [(1024, 1024 * 800)] * 2000, dips=20)
        assert run.plans[-1] is not SEQUENTIAL
        assert not planner.dropped

    def test_whatever_is_slower_than_calibrated_ends_near_sequential(self):
        gpu = Gpu()
        planner = gpu.planner()
        gpu.slower = {plan: 1.5 for plan in planner.plans[1:]}
        run = drive(planner, gpu, [(1024, 1024 * 800)] * 1000)
        assert set(run.plans[500:]) == {SEQUENTIAL}


class TestMeasuredMap:
    """The map of the documents: every point where auto and other plans were measured."""

    @pytest.mark.parametrize("seed", range(5))
    def test_auto_takes_the_best_plan_of_nearly_every_point(self, seed):
        points = held = 0
        for shape in measured_shapes(seed):
            planner = shape.planner()
            for point in shape.points:
                fresh = Planner(planner.table, planner.plans, planner.sizes)
                choice = fresh.choose(point.batch, point.batch * point.context)
                seconds = point.seconds[planner.plans[choice.plan].name]
                points += 1
                held += (
                    seconds <= point.seconds["sequential"] / 0.99
                    and seconds <= min(point.seconds.values()) / 0.98
                )
        assert points == 140
        assert held >= 138

    @pytest.mark.parametrize("shape", list(measured_shapes()), ids=lambda shape: shape.name)
    def test_a_calibration_measures_little(self, shape):
        shape.planner()
        assert len(shape.timed) <= 60
        assert [plan for plan, _ in shape.timed].count(SILLY) == 1
        # A sample takes about eight steps, or as many as fill 20 ms.
        assert sum(8 * max(seconds, 0.02) for _, seconds in shape.timed) < 14

    @pytest.mark.parametrize("shape", list(measured_shapes()), ids=lambda shape: shape.name)
    def test_where_contexts_grow_it_follows_the_best_plan(self, shape):
        planner = shape.planner()
        longest = min(shape.capacity // 1024, shape.max_len)
        auto, best, gain, plans = 0.0, 0.0, 1.0, []
        for context in range(64, longest, 2):
            costs = [shape.seconds(plan, 1024, 1024 * context) for plan in shape.plans]
            choice = planner.choose(1024, 1024 * context)
            auto, best = auto + costs[choice.plan], best + min(costs)
            gain = max(gain, costs[0] / min(costs))
            plans.append(choice.plan)
            planner.observe(choice.prediction, costs[choice.plan])
        assert auto <= 1.01 * best
        assert planner.switches <= 6
        if gain > 1.03:
            assert len(set(plans)) > 1


class TestRuns:
    def test_a_draining_batch_ends_sequential(self):
        gpu = Gpu()
        run = drive(gpu.planner(), gpu, [(n, n * 800) for n in range(1024, 0, -1)])
        assert run.plans[0] is not SEQUENTIAL
        assert run.plans[-1] is SEQUENTIAL
        assert run.taken < 1.03 * run.best

    @settings(max_examples=20)
    @given(seed=st.integers(0, 2**32))
    def test_what_is_lost_is_little_whatever_the_costs(self, seed):
        run = random_run(seed)
        assert run.taken < 1.15 * run.best
        assert run.taken <= 1.02 * run.sequential


class TestStatistics:
    def test_tell_what_was_done(self):
        planner = planner_of({0: [(0, 0.020)], 2: [(0, 0.010)]})
        assert planner.lines() == []
        assert planner.as_dict()["plan"] is None
        planner.choose(16, 99)
        for seconds in (0.010, 0.012):
            planner.observe(planner.choose(8, 99).prediction, seconds)
        record: Any = planner.as_dict()
        assert (record["plan"], record["switches"]) == ("green 36+96", 1)
        assert record["dropped"] == []
        assert record["plans"]["sequential"] == {
            "steps": 1, "predicted_ms": None, "measured_ms": None
        }  # fmt: skip
        used = record["plans"]["green 36+96"]
        assert used["steps"] == 2
        assert used["predicted_ms"] == pytest.approx(10)
        assert used["measured_ms"] == pytest.approx(11)
        assert planner.lines() == [
            "Plan: green 36+96 (switched 1 time)",
            "sequential: 1 steps, not measured",
            "green 36+96: 2 steps, predicted 10.00 ms, measured 11.00 ms",
        ]
