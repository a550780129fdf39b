"""Full garbage collections wait while requests run, and nothing of that stays."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM
from nanovllm.utils.garbage import few_full_collections

USUAL = (700, 10, 10)


class Knot:
    """An object that only a collection can free."""

    live = 0

    def __init__(self) -> None:
        self.own = self
        Knot.live += 1

    def __del__(self) -> None:
        Knot.live -= 1


@pytest.fixture(autouse=True)
def usual_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(*USUAL)
    yield
    gc.set_threshold(*before)


@pytest.fixture
def generations() -> Iterator[list[int]]:
    """Those that were collected."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            found.append(info["generation"])

    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)


def keep_many_objects() -> list[list[int]]:
    return [[i] for i in range(500_000)]


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python collects in small steps")
def test_full_collections_wait_for_the_end(generations: list[int]) -> None:
    assert keep_many_objects()
    assert 2 in generations
    generations.clear()
    with few_full_collections():
        assert keep_many_objects()
    assert 0 in generations
    assert 2 not in generations
    assert keep_many_objects()
    assert 2 in generations


@pytest.mark.parametrize("thresholds", [USUAL, (100, 5, 5000), (0, 10, 10)])
def test_the_thresholds_are_those_of_before(thresholds: tuple[int, int, int]) -> None:
    gc.set_threshold(*thresholds)
    with pytest.raises(ZeroDivisionError), few_full_collections():  # noqa: PT012
        assert gc.get_threshold() == (*thresholds[:2], max(thresholds[2], 1000))
        raise ZeroDivisionError
    assert gc.get_threshold() == thresholds


@pytest.mark.parametrize("first_to_end", [0, 1])
def test_nothing_stays_where_two_overlap(first_to_end: int) -> None:
    both = few_full_collections(), few_full_collections()
    for each in both:
        each.__enter__()
    both[first_to_end].__exit__(None, None, None)
    both[1 - first_to_end].__exit__(None, None, None)
    assert gc.get_threshold() == USUAL


def test_users_garbage_between_calls_does_not_pile_up(sound: Path) -> None:
    most = 0
    with LLM(str(sound)) as llm:
        for _ in range(120):
            for _ in range(100):
                Knot()
            llm.generate([[1]], max_tokens=1, use_tqdm=False)
            most = max(most, Knot.live)
    assert most < 6_000  # of 12,000


@pytest.mark.parametrize("deltas", [False, True])
def test_a_stream_that_only_a_collection_can_find_is_aborted(sound: Path, deltas: bool) -> None:
    with LLM(str(sound)) as llm:
        knot = Knot()
        params = {"max_tokens": 200, "ignore_eos": True}
        knot.stream = llm.stream([[1], [2, 3]], deltas=deltas, **params)  # type: ignore[attr-defined]
        if deltas:
            next(knot.stream)  # type: ignore[attr-defined]
            assert len(llm.requests) == 2
        assert gc.get_threshold() == USUAL
        del knot
        gc.collect()
        assert not llm.requests
