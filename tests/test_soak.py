"""A few seconds of the soak: right tokens, no request lost, nothing left in use."""

import random

import pytest

from tests.soak import growth, run
from tests.soak_calls import RandomCalls


def test_a_short_soak_finds_nothing():
    calls, first, last = run(5, seed=random.randrange(10**6))
    assert calls.problems == []
    assert calls.count > 1
    # Memory has not settled after so short a time.
    assert [name for name in growth(first, last) if name != "RSS [KiB]"] == []


@pytest.fixture(scope="module")
def calls():
    made = RandomCalls(seed=0, device="cpu", parts=["calls"])
    yield made
    made.exit()


def test_wrong_tokens_and_lost_requests_are_noticed(calls):
    driven = calls.living[0]
    for prompt, tokens in calls.canaries[:2]:
        options = {"temperature": 0, "max_tokens": len(tokens)}
        driven.owed[driven.engine.add_request(prompt, **options)] = [*tokens[:-1], tokens[-1] ^ 1]
    calls.drain(driven)
    assert len(calls.problems) == 2
    driven.owed[driven.engine.add_request("Once")] = None
    driven.engine.abort(next(iter(driven.owed)))
    calls.drain(driven)
    assert "lost" in calls.problems[-1]


def test_what_grows_is_named():
    first = {"RSS [KiB]": 1000, "descriptors": 6, "threads": 5}
    assert growth(first, first | {"RSS [KiB]": 1009, "threads": 4}) == []
    assert growth(first, first | {"RSS [KiB]": 1010, "descriptors": 7}) == list(first)[:2]
