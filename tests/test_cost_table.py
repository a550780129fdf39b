"""Cost tables: what was measured, and lines between."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.auto.cost_table import CostTable, seconds_at

TOKENS = st.integers(0, 10**7)
SECONDS = st.floats(1e-5, 10.0)
CURVES = st.dictionaries(TOKENS, SECONDS, min_size=1, max_size=6).map(lambda c: sorted(c.items()))
RISING = CURVES.map(lambda c: list(zip((t for t, _ in c), sorted(s for _, s in c), strict=True)))


@given(curve=CURVES, asked=TOKENS)
def test_a_curve_goes_through_its_points_and_nowhere_below_them(curve, asked):
    for tokens, seconds in curve:
        assert seconds_at(curve, tokens) == pytest.approx(seconds)
    assert seconds_at(curve, asked) >= min(seconds for _, seconds in curve) * (1 - 1e-9)


@given(curve=RISING, asked=st.lists(TOKENS, min_size=2))
def test_a_curve_rises_where_its_points_do(curve, asked):
    times = [seconds_at(curve, tokens) for tokens in sorted(asked)]
    assert all(a <= b * (1 + 1e-9) for a, b in pairwise(times))


@given(slope=st.floats(1e-9, 1e-6), dense=SECONDS, asked=TOKENS)
def test_a_line_goes_on_beyond_its_points_and_is_flat_before_them(slope, dense, asked):
    curve = [(tokens, dense + slope * tokens) for tokens in (1000, 2000)]
    assert seconds_at(curve, asked) == pytest.approx(dense + slope * max(asked, 1000), rel=1e-6)


def test_a_table_predicts_between_sizes_and_not_outside():
    table = CostTable()
    for size, tokens, seconds in (
        (64, 64_000, 0.020), (64, 64, 0.010), (128, 128, 0.014), (128, 128_000, 0.030)
    ):  # fmt: skip
        table.add(2, size, tokens, seconds)
    assert table.curves(2)[64] == [(64, 0.010), (64_000, 0.020)]
    assert table.seconds(2, 64, 64_000) == 0.020
    for tokens in (1, 5_000, 64_000, 500_000):
        at = {size: table.seconds(2, size, tokens) for size in (64, 80, 128)}
        assert at[80] == pytest.approx(0.75 * at[64] + 0.25 * at[128])
    assert [table.covers(2, size) for size in (63, 64, 80, 128, 129)] == [0, 1, 1, 1, 0]
    assert not table.covers(1, 64)
    for plan, size in ((2, 63), (2, 129), (1, 64)):
        with pytest.raises(LookupError, match=f"plan {plan}.*{size}"):
            table.seconds(plan, size, 64)
