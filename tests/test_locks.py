"""A lock is released whatever line an interrupt comes at."""

import threading
from contextlib import suppress

import pytest

from nanovllm.utils import locks
from nanovllm.utils.locks import exclusive
from tests.interrupts import Interrupt, InterruptAt
from tests.thread_rounds import run_all


@pytest.mark.parametrize("line", range(1, 12))
def test_no_interrupt_leaves_it_locked(line):
    lock, got = threading.RLock(), []
    with suppress(Interrupt), InterruptAt(line, [locks.__file__]):
        exclusive(lock, exclusive, lock, got.append, 1)
    run_all(lambda: exclusive(lock, got.append, 2))
    assert got[-1] == 2


def test_one_thread_at_a_time_and_what_it_returns():
    lock, inside, most = threading.RLock(), [], []

    def enter(number: int) -> int:
        inside.append(number)
        most.append(len(inside))
        inside.remove(number)
        return number

    def work() -> None:
        assert [exclusive(lock, enter, number) for number in range(200)] == list(range(200))

    run_all(work, work, work)
    assert max(most) == 1
