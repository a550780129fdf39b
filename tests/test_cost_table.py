"""Cost tables: curves through samples, where to sample, what a pipeline can gain, and the disk."""

from __future__ import annotations

import json
import math
import random
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.engine.cost_table import CostTable, Curve, gain_bound, next_sample
from nanovllm.utils.disk_cache import DiskCache

TOKENS = st.integers(0, 10**7)
SECONDS = st.floats(1e-5, 10.0)
SAMPLES = st.dictionaries(TOKENS, SECONDS, min_size=1, max_size=6).map(lambda s: list(s.items()))
RISING = SAMPLES.map(
    lambda s: list(zip(sorted(t for t, _ in s), sorted(x for _, x in s), strict=True))
)


class TestCurve:
    @given(samples=SAMPLES, seed=st.randoms())
    def test_goes_through_its_samples_in_any_order(self, samples, seed):
        seed.shuffle(samples)
        curve = Curve(samples)
        assert [curve.at(tokens) for tokens, _ in samples] == [seconds for _, seconds in samples]

    @given(samples=RISING, asked=st.lists(TOKENS, min_size=2))
    def test_rises_where_its_samples_do(self, samples, asked):
        curve = Curve(samples)
        times = [curve.at(tokens) for tokens in sorted(asked)]
        assert all(a <= b * (1 + 1e-12) for a, b in pairwise(times))

    @given(samples=SAMPLES, asked=TOKENS)
    def test_is_never_below_its_least_sample(self, samples, asked):
        least = min(seconds for _, seconds in samples)
        assert Curve(samples).at(asked) >= least * (1 - 1e-9)

    @given(slope=st.floats(1e-9, 1e-6), dense=SECONDS, asked=TOKENS, samples=st.sets(TOKENS))
    def test_of_a_line_is_the_line_and_flat_before_it(self, slope, dense, asked, samples):
        points = {0, 100, *samples} if asked % 2 else {1000, 2000}
        curve = Curve((t, dense + slope * t) for t in points)
        assert curve.at(asked) == pytest.approx(dense + slope * max(asked, min(points)), rel=1e-6)

    @given(low=RISING, high=RISING, share=st.floats(0, 1), asked=TOKENS)
    def test_mixed_is_between_two_at_every_token(self, low, high, share, asked):
        low, high = Curve(low), Curve(high)
        want = (1 - share) * low.at(asked) + share * high.at(asked)
        assert low.mixed(high, share).at(asked) == pytest.approx(want, rel=1e-6)


class TestTable:
    def test_predicts_between_batch_sizes_and_not_outside(self):
        table = CostTable()
        table.add("green 36+96", 64, [(64, 0.010), (64_000, 0.020)])
        table.add("green 36+96", 128, [(128, 0.014), (128_000, 0.030)])
        assert table.batches("green 36+96") == [64, 128]
        assert table.batches("streams") == []
        assert table.predict("green 36+96", 64, 64_000) == 0.020
        assert table.predict("green 36+96", 128, 128) == 0.014
        for tokens in (1, 5_000, 64_000, 500_000):
            at = {b: table.predict("green 36+96", b, tokens) for b in (64, 80, 128)}
            assert at[80] == pytest.approx(0.75 * at[64] + 0.25 * at[128])
        assert table.predict("green 36+96", 63, 64) is None
        assert table.predict("green 36+96", 129, 64) is None
        assert table.predict("streams", 64, 64) is None

    def test_grows(self):
        table = CostTable()
        table.add("a", 8, [(1, 1.0)])
        assert table.predict("a", 12, 1) is None
        table.add("a", 16, [(1, 3.0)])
        assert table.predict("a", 12, 1) == 2.0
        table.add("a", 16, [(1, 5.0)])
        assert table.predict("a", 12, 1) == 3.0

    @pytest.mark.parametrize(
        ("batch", "samples"),
        [
            (8, []),
            (0, [(1, 1.0)]),
            (8, [(1, 1.0), (1, 2.0)]),
            (8, [(-1, 1.0)]),
            (8, [(1, 0.0)]),
            (8, [(1, math.nan)]),
            (8, [(1, math.inf)]),
        ],
    )
    def test_refuses_samples_that_cannot_be_right(self, batch, samples):
        table = CostTable()
        with pytest.raises(ValueError, match=f"'green' at batch {batch}"):
            table.add("green", batch, samples)
        assert table.batches("green") == []


class TestDisk:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
    @given(
        content=st.dictionaries(
            st.text(max_size=12), st.dictionaries(st.integers(1, 2048), SAMPLES, min_size=1)
        )
    )
    def test_round_trip(self, tmp_path, content):
        table = CostTable()
        for plan, curves in content.items():
            for batch, samples in curves.items():
                table.add(plan, batch, samples)
        cache, key = DiskCache("plans", tmp_path), {"device": "H200", "shape": [36, 4096]}
        table.save(cache, key)
        loaded = CostTable.load(cache, key)
        assert loaded.to_json() == table.to_json()
        for plan, curves in content.items():
            for batch, samples in curves.items():
                assert [loaded.predict(plan, batch, t) for t, _ in samples] == [
                    seconds for _, seconds in samples
                ]

    def test_of_another_key_is_empty(self, tmp_path):
        table, cache = CostTable(), DiskCache("plans", tmp_path)
        table.add("a", 8, [(1, 1.0)])
        table.save(cache, {"driver": "580"})
        assert CostTable.load(cache, {"driver": "581"}).to_json() == {}

    @pytest.mark.parametrize(
        "value",
        [
            7,
            [],
            {"a": [1]},
            {"a": {"x": []}},
            {"a": {"8": []}},
            {"a": {"8": 5}},
            {"a": {"8": [[1]]}},
            {"a": {"8": [[1, "x"]]}},
            {"a": {"8": [[1, -1.0]]}},
            {"a": {"8": [[1, None]]}},
        ],
        ids=json.dumps,
    )
    def test_a_foreign_value_is_ignored_with_a_warning(self, tmp_path, caplog, value):
        cache = DiskCache("plans", tmp_path)
        cache.write({}, value)
        assert CostTable.load(cache, {}).to_json() == {}
        (warned,) = [record.getMessage() for record in caplog.records]
        assert "is ignored" in warned


def samples_of(cost, batch, longest, **options):
    """What a calibration measures."""
    samples = []
    while (tokens := next_sample(samples, batch, longest, **options)) is not None:
        samples.append((tokens, cost(tokens)))
        assert len(samples) <= 50
    return samples


class TestNextSample:
    @given(
        batch=st.integers(1, 1024),
        context=st.integers(16, 8192),
        dense=st.floats(1e-3, 0.1),
        bandwidth=st.floats(1e6, 1e9),
    )
    def test_a_line_takes_three(self, batch, context, dense, bandwidth):
        samples = samples_of(lambda t: dense + t / bandwidth, batch, batch * context)
        assert len(samples) <= 3
        curve = Curve(samples)
        for share in (0.1, 0.37, 0.8, 1.5):
            tokens = max(share * batch * context, batch)
            assert curve.at(tokens) == pytest.approx(dense + tokens / bandwidth, rel=1e-2)

    @settings(max_examples=200)
    @given(
        batch=st.sampled_from([64, 128, 512, 1024]),
        context=st.integers(256, 8192),
        dense=st.floats(1e-3, 0.1),
        knee=st.floats(0.01, 2.0),
        sharpness=st.floats(4, 60),
    )
    def test_finds_the_knee_wherever_it_is(self, batch, context, dense, knee, sharpness):
        def cost(tokens):
            attention = dense * tokens / (knee * batch * context)
            return (dense**sharpness + attention**sharpness) ** (1 / sharpness)

        samples = samples_of(cost, batch, batch * context)
        assert len(samples) <= 6
        assert all(tokens % batch == 0 for tokens, _ in samples)
        curve = Curve(samples)
        for share in range(1, 101):
            tokens = share / 100 * batch * context
            # A context of one token more or less is the finest that can be measured.
            grain = 2 / (knee * context)
            assert curve.at(tokens) == pytest.approx(cost(tokens), rel=0.03 + grain)

    def test_stays_within_the_range_and_ends_under_noise(self):
        noise = random.Random(5)
        for _ in range(300):
            batch, longest = noise.randint(1, 300), noise.randint(1, 100_000)
            most = noise.randint(2, 8)
            samples = samples_of(lambda _: noise.uniform(1, 3), batch, longest, most=most)
            tokens = [t for t, _ in samples]
            assert len(set(tokens)) == len(tokens) <= most
            assert all(batch <= t <= max(longest, batch) and t % batch == 0 for t in tokens)

    def test_one_sample_where_no_more_fit(self):
        assert samples_of(lambda _: 1.0, 64, 100) == [(64, 1.0)]


class TestGainBound:
    @given(
        dense=st.floats(0.5, 5),
        half=st.floats(0.5, 1.0),
        slope=st.floats(1e-7, 1e-3),
        longest=st.integers(1_000, 1_000_000),
        weights=st.integers(0, 100_000),
    )
    def test_is_the_best_over_all_tokens(self, dense, half, slope, longest, weights):
        whole = Curve([(100, dense), (longest // 2, dense + slope * (longest // 2 - 100))])
        part = Curve([(50, half * dense)])
        bound = gain_bound(whole, part, longest, weight_tokens=weights)
        gains = []
        for step in range(2001):
            tokens = 100 + (longest - 100) * step / 2000
            attention = slope * (tokens - 100)
            gains.append((dense + attention) / max(2 * half * dense, attention + slope * weights))
        assert bound >= max(gains) * (1 - 1e-9)
        # The bound's peak lies between two steps of this search, each of which adds so much:
        grain = slope * longest / 2000 / dense
        assert bound <= max(gains) * (1 + 2 * grain) + 1e-9

    def test_says_no_where_the_weights_bound_the_dense_work(self):
        # 8 sequences: both halves read the same weights as the whole batch does.
        few = Curve([(8, 0.004), (80_000, 0.0065)])
        weight_tokens = 0.004 / (0.0025 / 80_000)
        assert gain_bound(few, Curve([(4, 0.004)]), 80_000, weight_tokens=weight_tokens) <= 1.0

    def test_says_yes_where_arithmetic_does(self):
        many = Curve([(1024, 0.020), (500_000, 0.040)])
        half = Curve([(512, 0.0105)])
        assert gain_bound(many, half, 500_000, weight_tokens=100_000) > 1.5
        assert gain_bound(many, half, 20_000, weight_tokens=100_000) < 1.0
