"""Garbage collections leave out what was there before."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM
from nanovllm.utils.garbage import only_new_garbage


class Knot:
    """An object that only a collection can free."""

    def __init__(self) -> None:
        self.own = self


def drop_knot() -> weakref.ref[Knot]:
    return weakref.ref(Knot())


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    enabled = gc.isenabled()
    gc.disable()
    yield
    gc.unfreeze()
    if enabled:
        gc.enable()


def test_only_new_garbage_is_freed_within() -> None:
    old = drop_knot()
    with only_new_garbage():
        new = drop_knot()
        gc.collect()
        assert old() is not None
        assert new() is None
    gc.collect()
    assert old() is None


def test_an_error_ends_it() -> None:
    old = drop_knot()
    with pytest.raises(ZeroDivisionError), only_new_garbage():
        raise ZeroDivisionError
    gc.collect()
    assert old() is None


def test_it_works_where_objects_are_frozen_already() -> None:
    gc.freeze()
    old = drop_knot()
    with only_new_garbage():
        gc.collect()
        assert old() is not None
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("breaks_off", [False, True])
def test_old_garbage_stays_while_requests_run(sound: Path, breaks_off: bool) -> None:
    with LLM(str(sound)) as llm:
        stream = llm.stream([[1, 2], [3]], max_tokens=4, ignore_eos=True, deltas=True)
        old = drop_knot()
        next(stream)
        gc.collect()
        assert old() is not None
        if breaks_off:
            stream.close()
        else:
            assert len(list(stream)) > 2
        gc.collect()
        assert old() is None
