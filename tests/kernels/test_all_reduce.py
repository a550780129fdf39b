"""All-reduce with residual and norm, and gather: processes that share memory stand for GPUs."""

import random
import threading
import time
from dataclasses import dataclass
from queue import Empty
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from nanovllm.kernels import reference
from nanovllm.kernels.all_reduce import Peers, all_reduce_add_norm, gather, push_add_norm

EPS = 1e-6
STEPS = 6  # each buffer is used several times
PATIENCE = 100_000_000  # polls
FIRST = 2  # where the rows begin in the buffers


@dataclass(frozen=True)
class Case:
    size: int
    rows: int
    hidden: int
    programs: int
    two_shot: bool = False
    pushed: bool = False
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def parts(self, step: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1 + step)
        shape = self.rows, self.hidden
        return [torch.randn(shape, generator=generator).to(self.dtype) for _ in range(self.size)]

    def residual_and_weight(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        residual = torch.randn(self.rows, self.hidden, generator=generator)
        return residual.to(self.dtype), torch.rand(self.hidden, generator=generator).to(self.dtype)

    def expected(self) -> list[torch.Tensor]:
        """What each step's norm is."""
        residual, weight = self.residual_and_weight()
        results = []
        for step in range(STEPS):
            total = torch.zeros(self.rows, self.hidden)
            for part in self.parts(step):
                total += part.float()
            residual = (total + residual.float()).to(self.dtype)
            results.append(reference.rms_norm(residual, weight, EPS))
        return results


def addresses(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def peers_of(rank: int, counters: list[torch.Tensor], polls: int = PATIENCE) -> Peers:
    _, programs, size = counters[0].shape
    launches, expired = torch.zeros(programs, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    return Peers(rank, size, addresses(counters), launches, expired, programs, polls)


def shared(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype).share_memory_() for _ in range(count)]


def rank_steps(rank: int, case: Case, memory: Any, results: mp.Queue) -> None:
    """What one rank does: all-reduces in turn on two buffers, and a gather behind each.

    Each has another number of programs, and all two-shots scatter their rows into one buffer.
    """
    torch.set_num_threads(1)
    parts, scattered, outputs, pushed, counters, inboxes = memory
    peers = peers_of(rank, counters)
    residual, weight = case.residual_and_weight()
    shape = case.rows, case.hidden
    found, gathered = [], []
    for step in range(STEPS):
        turn = step % 2
        parts[turn][rank][FIRST:] = case.parts(step)[rank]
        if case.pushed:
            push_add_norm(
                peers, parts[turn][rank][FIRST:], addresses(pushed[turn]), FIRST + case.rows,
                outputs[turn][rank][FIRST:], FIRST, residual, weight, EPS,
            )  # fmt: skip
        else:
            programs = random.Random(step).randint(1, case.programs)
            all_reduce_add_norm(
                peers, addresses(parts[turn]), addresses(scattered), addresses(outputs[turn]),
                FIRST, shape, residual, weight, EPS, programs, case.two_shot,
            )  # fmt: skip
        found.append(outputs[turn][rank][FIRST:].clone())
        gather(peers, torch.arange(3) + 10 * rank + 100 * step, addresses(inboxes[turn]))
        gathered.append(inboxes[turn][rank].tolist())
    results.put((rank, [x.float().numpy() for x in found], gathered, int(peers.expired)))


@pytest.mark.parametrize(
    "case",
    [
        Case(size=2, rows=5, hidden=48, programs=3, two_shot=False),
        Case(size=3, rows=7, hidden=40, programs=2, two_shot=True, seed=1),
        Case(size=2, rows=11, hidden=64, programs=1, two_shot=True, dtype=torch.bfloat16, seed=2),
        Case(size=3, rows=4, hidden=40, programs=6, pushed=True, seed=3),
        Case(size=2, rows=3, hidden=64, programs=5, pushed=True, dtype=torch.bfloat16, seed=4),
    ],
    ids=["one-shot", "two-shot", "bfloat16", "pushed", "pushed bfloat16"],
)
def test_ranks_get_the_norm_of_the_sum(case):
    shape = FIRST + case.rows, case.hidden
    memory = (
        [shared(case.size, shape, case.dtype) for _ in range(2)],
        shared(case.size, (case.size, -(-case.rows // case.size), case.hidden), case.dtype),
        [shared(case.size, shape, case.dtype) for _ in range(2)],
        [shared(case.size, (case.size, *shape), torch.int64) for _ in range(2)],
        shared(case.size, (2, case.programs, case.size), torch.int32),
        [shared(case.size, (case.size, 3), torch.int64) for _ in range(2)],
    )
    context = mp.get_context("spawn")
    results = context.Queue()
    workers = mp.spawn(rank_steps, (case, memory, results), nprocs=case.size, join=False)
    try:
        found = sorted((results.get(timeout=250) for _ in range(case.size)), key=lambda x: x[0])
    except Empty:
        workers.join(timeout=1)
        raise
    workers.join()
    # The interpreter rounds to bfloat16 otherwise than torch, and a residual is rounded often.
    rounding = {"rtol": 2e-2, "atol": 5e-2} if case.dtype == torch.bfloat16 else {}
    for rank, norms, gathered, expired in found:
        assert expired == 0
        for norm, expected, own in zip(norms, case.expected(), found[0][1], strict=True):
            torch.testing.assert_close(torch.from_numpy(norm), expected.float(), **rounding)
            assert (norm == own).all(), rank  # the same bits everywhere
        assert gathered == [
            [[100 * step + 10 * peer + i for i in range(3)] for peer in range(case.size)]
            for step in range(STEPS)
        ]


def all_reduce_alone(peers: Peers, outputs: list[torch.Tensor], inboxes, way: str) -> None:
    parts, residual = [torch.ones(2, 32) for _ in range(2)], torch.ones(2, 32)
    weight = torch.ones(32)
    if way == "pushed":
        push_add_norm(peers, parts[0], addresses(inboxes), 2, outputs[0], 0, residual, weight, EPS)
    else:
        all_reduce_add_norm(
            peers, addresses(parts), addresses(inboxes), addresses(outputs), 0, (2, 32), residual,
            weight, EPS, 1, way == "two-shot",
        )  # fmt: skip


def alone() -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Counters, outputs and inboxes of two ranks."""
    return (
        [torch.zeros(2, 2, 2, dtype=torch.int32) for _ in range(2)],
        [torch.zeros(2, 32) for _ in range(2)],
        [torch.zeros(2, 2, 32, dtype=torch.int64) for _ in range(2)],
    )


@pytest.mark.parametrize("way", ["one-shot", "two-shot", "pushed"])
def test_a_wait_ends_and_tells_the_peers(way):
    counters, *buffers = alone()
    waiting = peers_of(0, counters, polls=3)
    all_reduce_alone(waiting, *buffers, way)
    assert waiting.expired.item() == 1
    all_reduce_alone(waiting, *buffers, way)  # at once, and with a word to rank 1
    late = peers_of(1, counters)
    late.launches.fill_(1)
    all_reduce_alone(late, *buffers, way)
    assert late.expired.item() == 1


def test_numbers_in_a_slot_only_grow():
    """Else a wait could take what a peer pushed long before, whatever was launched in between."""
    counters = [torch.zeros(2, 4, 2, dtype=torch.int32) for _ in range(2)]
    parts, outputs = ([torch.ones(4, 32) for _ in range(2)] for _ in range(2))
    inboxes = [torch.zeros(2, 4, 32, dtype=torch.int64) for _ in range(2)]
    peers, weight = peers_of(0, counters, polls=1), torch.ones(32)
    for _ in range(40):
        first = random.randrange(4)
        rows = random.randint(1, 4 - first)
        peers.expired.zero_()
        if random.random() < 0.5:
            before = inboxes[1][0, first : first + rows].clone()
            push_add_norm(
                peers, parts[0][:rows], addresses(inboxes), 4, outputs[0][:rows], first,
                torch.ones(rows, 32), weight, EPS,
            )  # fmt: skip
            after = inboxes[1][0, first : first + rows]
            # Without what says that a wait was given up, as here all are.
            assert ((after & 0x3FFFFFFF) > (before & 0x3FFFFFFF)).all()
        else:
            all_reduce_add_norm(
                peers, addresses(parts), addresses(parts), addresses(outputs), 0, (rows, 32),
                torch.ones(rows, 32), weight, EPS, random.randint(1, 4), False,
            )  # fmt: skip


@pytest.mark.parametrize("way", ["one-shot", "two-shot", "pushed"])
def test_a_wait_ends_when_it_is_told_to(way):
    counters, *buffers = alone()
    waiting = peers_of(0, counters)
    thread = threading.Thread(target=lambda: (time.sleep(0.5), waiting.expired.fill_(1)))
    thread.start()
    all_reduce_alone(waiting, *buffers, way)
    thread.join()
    assert waiting.expired.item() == 1
