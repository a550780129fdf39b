"""The planner on a simulated GPU: what it chooses, when it changes, and what it learns."""

from __future__ import annotations

import dataclasses
import math
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.cost_table import CostTable
from nanovllm.engine.plan import GREEN
from nanovllm.engine.planner import Planner
from tests.simulated_gpu import (
    CALIBRATED,
    PLANS,
    SEQUENTIAL,
    SIZES,
    STREAMS,
    Gpu,
    Run,
    calibrate,
    crossover,
    drive,
    random_run,
    true_costs,
)


class TestChoice:
    @pytest.mark.parametrize("batch", [1, 2, 8, 31, 64, 100, 250, 512, 1000, 1024])
    def test_is_the_optimum_at_once_wherever_it_is(self, batch):
        gpu = Gpu()
        table = calibrate(gpu)
        chosen = set()
        for context in (1, 16, 128, 512, 1024, 2048, 4096, 8192):
            tokens = batch * context
            choice = Planner(table, SIZES).choose(batch, tokens)
            costs = true_costs(gpu, batch, tokens)
            # Between calibrated sizes the table is a little off itself.
            within = 1.01 if batch in CALIBRATED else 1.05
            assert costs[choice.plan] <= within * min(costs.values())
            assert choice.seconds == pytest.approx(costs[choice.plan], rel=0.05)
            chosen.add(choice.plan)
        if batch >= 512:
            assert len(chosen) >= 3  # or this test would say nothing

    def test_is_among_graphs_that_exist_and_are_calibrated(self):
        table = CostTable()
        table.add("sequential", 8, [(1, 4.0)])
        table.add("sequential", 64, [(1, 4.0)])
        table.add("streams", 16, [(1, 1.0)])
        table.add("streams", 32, [(1, 1.0)])
        planner = Planner(table, {SEQUENTIAL: [64, 8, 128], STREAMS: [32, 8]})

        def chosen(num_seqs: int) -> tuple[str, int, float | None]:
            choice = planner.choose(num_seqs, 100)
            return choice.plan.name, choice.batch, choice.seconds

        assert chosen(3) == ("sequential", 8, 4.0)  # streams is calibrated for 16 and more
        assert chosen(32) == ("streams", 32, 1.0)
        assert chosen(33) == ("sequential", 64, 4.0)  # streams has no graph
        assert chosen(100) == ("sequential", 128, None)  # nothing is known
        planner.add_size(STREAMS, 16)
        planner.add_size(STREAMS, 16)
        assert chosen(12) == ("streams", 16, 1.0)
        table.add("streams", 64, [(1, 5.0)])
        table.add("sequential", 128, [(1, 9.0)])
        planner.add_size(STREAMS, 64)
        assert chosen(60) == ("sequential", 64, 4.0)
        assert chosen(30) == ("streams", 32, 1.0)
        with pytest.raises(ValueError, match="num_seqs=129: the largest graph of 'sequential'"):
            planner.choose(129, 100)

    def test_is_the_default_unless_another_gains_more_than_the_handicap(self):
        table = CostTable()
        table.add("sequential", 8, [(0, 1.00)])
        table.add("streams", 8, [(0, 0.98), (999, 0.98), (1000, 0.94)])
        sizes = {SEQUENTIAL: [8], STREAMS: [8]}
        planner = Planner(table, sizes, handicap=0.03)
        assert {planner.choose(8, 900).plan for _ in range(20)} == {SEQUENTIAL}
        assert [planner.choose(8, 1000).plan for _ in range(20)][-1] is STREAMS
        # What it says is the prediction, without the handicap.
        assert planner.choose(8, 1000).seconds == pytest.approx(0.94)
        # Back it goes where the gain is under the handicap by the margin.
        table.add("streams", 8, [(0, 0.99)])
        assert [planner.choose(8, 900).plan for _ in range(20)][-1] is SEQUENTIAL

    def test_without_a_calibrated_default_is_the_default(self):
        table = CostTable()
        table.add("streams", 8, [(1, 1.0)])
        planner = Planner(table, {SEQUENTIAL: [8], STREAMS: [8]})
        for _ in range(10):
            choice = planner.choose(8, 100)
            assert choice.plan is SEQUENTIAL
            planner.observe(choice, 2.0)
        table.add("sequential", 8, [(1, 2.0)])
        assert [planner.choose(8, 100).plan for _ in range(4)][-1] is STREAMS

    def test_calls_little(self):
        """Counts calls, because times on a shared machine say little."""
        gpu = Gpu()
        planner = Planner(calibrate(gpu), SIZES)
        drive(planner, gpu, [(512, 512 * 600)] * 10)
        calls = 0

        def count(_frame, event, _argument):
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        choice = planner.choose(512, 512 * 600)
        sys.setprofile(None)
        assert calls <= 25 + 10 * len(PLANS)
        calls = 0
        sys.setprofile(count)
        planner.observe(choice, 0.02)
        sys.setprofile(None)
        assert calls <= 60

    @pytest.mark.parametrize(
        ("sizes", "options"),
        [
            ({}, {}),
            ({SEQUENTIAL: [1], dataclasses.replace(SEQUENTIAL, micro_batches=7): [1]}, {}),
            ({SEQUENTIAL: [1]}, {"margin": -0.1}),
            ({SEQUENTIAL: [1]}, {"patience": 0}),
            ({SEQUENTIAL: [1]}, {"handicap": 1.0}),
        ],
    )
    def test_refuses_what_makes_no_sense(self, sizes, options):
        with pytest.raises(ValueError, match=r"sizes=|margin="):
            Planner(CostTable(), sizes, **options)

    @pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
    def test_refuses_a_time_that_is_none(self, seconds):
        planner = Planner(calibrate(Gpu()), SIZES)
        with pytest.raises(ValueError, match="seconds="):
            planner.observe(planner.choose(8, 800), seconds)


class TestHysteresis:
    def test_waits_for_its_patience_and_not_after_a_jump(self):
        table = CostTable()
        table.add("sequential", 1, [(0, 1.00), (900, 1.00), (1000, 1.02)])
        table.add("sequential", 512, [(0, 1.00), (900, 1.00), (1000, 1.02)])
        table.add("streams", 1, [(0, 1.005)])
        table.add("streams", 512, [(0, 1.005)])
        sizes = {p: [1, 512] for p in (SEQUENTIAL, STREAMS)}
        planner = Planner(table, sizes, patience=4, handicap=0.0)
        chosen = [planner.choose(512, t).plan for t in (900, 1000, 1000, 900, 1000, 1000, 1000)]
        assert set(chosen) == {SEQUENTIAL}
        assert planner.choose(512, 1000).plan is STREAMS
        # Sequential is better again, but by less than the margin.
        assert {planner.choose(512, 900).plan for _ in range(20)} == {STREAMS}
        assert planner.switches == 1
        assert planner.choose(1, 700).plan is SEQUENTIAL
        assert planner.switches == 2

    @pytest.mark.parametrize("batch", [256, 512, 1024])
    @pytest.mark.parametrize("seed", range(5))
    def test_does_not_flap_where_two_plans_are_equal(self, batch, seed):
        gpu = Gpu(noise=0.03, outliers=0.01, random=random.Random(seed))
        planner = Planner(calibrate(gpu), SIZES)
        run = drive(planner, gpu, [(batch, crossover(gpu, batch))] * 1000)
        assert run.switches <= 6
        assert run.regret() < 0.01

    def test_one_outlier_is_nothing(self):
        gpu = Gpu()
        tokens = crossover(gpu, 512)
        planner = Planner(calibrate(gpu), SIZES)
        drive(planner, gpu, [(512, tokens)] * 20)
        plan = planner.current
        before = planner.choose(512, tokens).seconds
        for _ in range(20):
            for slow in (3.0, 1.0, 1.0, 1.0):
                choice = planner.choose(512, tokens)
                assert choice.plan == plan
                assert choice.seconds == pytest.approx(before, rel=0.005)
                planner.observe(choice, slow * gpu.true(choice.plan, 512, tokens))

    def test_two_outliers_together_are_little(self):
        gpu = Gpu(noise=0.005)
        tokens = 512 * 350
        planner = Planner(calibrate(gpu), SIZES)
        best = planner.choose(512, tokens).plan
        for steps in (3, 30, 300):
            drive(planner, gpu, [(512, tokens)] * steps)
            for _ in range(2):
                choice = planner.choose(512, tokens)
                planner.observe(choice, 3 * gpu.true(choice.plan, 512, tokens))
            assert set(drive(planner, gpu, [(512, tokens)] * 30).plans) == {best}


class TestCorrection:
    @pytest.mark.parametrize("tokens", [512 * 300, 512 * 600, 512 * 2000])
    @pytest.mark.parametrize("seed", range(3))
    def test_leaves_a_plan_that_is_not_what_it_promised(self, tokens, seed):
        gpu = Gpu(noise=0.01, random=random.Random(seed))
        table = calibrate(gpu)
        promised = Planner(table, SIZES).choose(512, tokens)
        costs = true_costs(gpu, 512, tokens)
        # Promised to be 10% faster than all others, and really 20% slower.
        best = min(cost for plan, cost in costs.items() if plan is not promised.plan)
        liar = promised.plan
        gpu.slower[liar] = 1.2 * best / costs[liar]
        table.add(liar.name, 512, [(512, 0.9 * best)])
        planner = Planner(table, SIZES)
        run = drive(planner, gpu, [(512, tokens)] * 1500)
        assert run.plans[0] is liar
        assert liar not in run.plans[10:]
        assert run.regret(10) < 0.01

    def test_tries_a_plan_again_one_day(self):
        gpu = Gpu(noise=0.01)
        tokens = 512 * 880
        planner = Planner(calibrate(gpu), SIZES)
        best, second = sorted((costs := true_costs(gpu, 512, tokens)), key=costs.__getitem__)[:2]
        assert costs[second] > 1.02 * costs[best]
        gpu.slower[best] = 1.3
        run = drive(planner, gpu, [(512, tokens)] * 300)
        assert run.plans[0] is best
        assert best not in run.plans[20:]
        gpu.slower[best] = 1.0
        run = drive(planner, gpu, [(512, tokens)] * 20_000)
        assert set(run.plans[-100:]) == {best}

    @pytest.mark.parametrize("clocks", [0.8, 0.9, 1.1, 1.35])
    @pytest.mark.parametrize("context", [100, 300, 600, 2000])
    def test_clocks_that_change_for_all_plans_cost_little(self, clocks, context):
        gpu = Gpu(noise=0.01)
        planner = Planner(calibrate(gpu), SIZES)
        steps = [(512, 512 * context)] * 400
        before = drive(planner, gpu, steps)
        gpu.clocks = clocks
        during = drive(planner, gpu, steps)
        gpu.clocks = 1.0
        after = drive(planner, gpu, steps)
        # A large change puts the plan in doubt, too; then at most each other one is tried.
        most = 4 if abs(clocks - 1) <= 0.11 else 2 * len(PLANS)
        assert during.switches <= most
        assert after.switches <= most
        for run in (before, during, after):
            assert run.regret() < 0.01

    @pytest.mark.parametrize("clocks", [0.8, 1.25])
    def test_clocks_other_than_in_calibration_cost_a_few_trials(self, clocks):
        gpu = Gpu(noise=0.01)
        planner = Planner(calibrate(gpu), SIZES)
        gpu.clocks = clocks
        run = drive(planner, gpu, [(512, 512 * 600)] * 2000)
        assert run.regret() < 0.01
        assert run.switches <= 12

    def test_clocks_that_wander_do_not_make_the_planner_wander(self):
        gpu = Gpu(noise=0.01)
        planner = Planner(calibrate(gpu), SIZES)
        run = Run()
        for turn in range(40):
            gpu.clocks = 1 + 0.15 * math.sin(turn)
            part = drive(planner, gpu, [(512, 512 * 400)] * 50)
            run.plans += part.plans
            run.taken += part.taken
            run.costs += part.costs
        assert run.regret() < 0.01
        assert run.switches <= 20

    def test_a_plan_that_gets_slower_by_itself_late_is_left_in_the_end(self):
        gpu = Gpu(noise=0.01)
        planner = Planner(calibrate(gpu), SIZES)
        drive(planner, gpu, [(512, 512 * 600)] * 500)
        plan = planner.current
        gpu.slower[plan] = 1.2
        run = drive(planner, gpu, [(512, 512 * 600)] * 3000)
        assert plan not in run.plans[-500:]
        assert run.regret(1500) < 0.01


class TestRuns:
    @pytest.mark.parametrize("noise", [0.0, 0.02])
    @pytest.mark.parametrize("clocks", [0.85, 1.0, 1.1])
    def test_growing_contexts_change_the_plan_as_the_costs_say(self, noise, clocks):
        gpu = Gpu(noise=noise, outliers=noise / 4)
        planner = Planner(calibrate(gpu), SIZES)
        gpu.clocks = clocks
        run = drive(planner, gpu, [(512, 512 * context) for context in range(128, 4097)])
        assert sum(run.taken) <= 1.01 * run.best_fixed()
        assert run.regret() < 0.005
        assert len(set(run.plans)) >= 3
        assert run.switches <= (12 if clocks == 1 else 30)
        behind = [
            taken / min(costs.values()) for taken, costs in zip(run.taken, run.costs, strict=True)
        ]
        # Clocks that are not those of the calibration cost trials of the next best plans.
        few = 0.02 if clocks == 1 else 0.08
        assert sum(share > 1.02 for share in behind) <= few * len(behind)
        assert max(behind) <= 1.12

    def test_a_draining_batch_ends_sequential(self):
        gpu = Gpu(noise=0.02)
        planner = Planner(calibrate(gpu), SIZES)
        run = drive(planner, gpu, [(n, n * 800) for n in range(1024, 0, -1)])
        assert run.plans[0] is not SEQUENTIAL
        assert run.plans[-1] is SEQUENTIAL
        assert run.regret() < 0.03

    @settings(max_examples=30, deadline=None)
    @given(seed=st.integers(0, 2**32))
    def test_regret_is_bounded_whatever_the_costs(self, seed):
        # A plan that is up to 2% better than calibrated, beside one that is up to 2% worse, is not
        # found, as it is not measured; nor is one within the margin.
        assert random_run(seed).regret() < 0.05

    def test_regret_is_small_on_average(self):
        assert sum(random_run(seed).regret() for seed in range(40)) / 40 < 0.003


class TestStatistics:
    def test_tell_what_was_done(self):
        table = CostTable()
        table.add("sequential", 8, [(0, 0.020)])
        green = GREEN.with_sms((36, 96))
        table.add("green 36+96", 8, [(0, 0.010)])
        planner = Planner(table, {SEQUENTIAL: [8, 16], green: [8], STREAMS: [8]})
        assert planner.lines() == []
        assert planner.as_dict()["plan"] is None
        planner.choose(16, 99)
        for seconds in (0.010, 0.012):
            planner.observe(planner.choose(8, 99), seconds)
        assert planner.current == green
        assert planner.as_dict() == {
            "plan": "green 36+96",
            "switches": 1,
            "plans": {
                "sequential": {"steps": 1, "predicted_ms": None, "measured_ms": None},
                "green 36+96": {
                    "steps": 2,
                    "predicted_ms": pytest.approx(10.0),
                    "measured_ms": pytest.approx(11.0),
                },
                "streams": {"steps": 0, "predicted_ms": None, "measured_ms": None},
            },
        }
        assert planner.lines() == [
            "Plan: green 36+96 (switched 1 time)",
            "sequential: 1 steps, not measured",
            "green 36+96: 2 steps, predicted 10.00 ms, measured 11.00 ms",
        ]
