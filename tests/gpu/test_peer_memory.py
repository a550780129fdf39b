"""Collectives over the memory of several GPUs: right, the same bits after any delay, bounded."""

import time

import pytest
import torch
import torch.distributed as dist

from nanovllm import kernels
from nanovllm.layers.peer_memory import MOST_ROWS, PeerMemory
from tests.gpu import peer_ranks
from tests.gpu.peer_ranks import HIDDEN

COUNT = torch.cuda.device_count()
if COUNT < 2:
    pytest.skip(f"needs 2 CUDA devices, and there are {COUNT}", allow_module_level=True)

SIZES = [size for size in (2, 4) if size <= COUNT]
EPS = 1e-6
REPLAYS = 10_000


def same_everywhere(x: torch.Tensor) -> bool:
    first = x.clone()
    dist.broadcast(first, 0)
    return torch.equal(first, x)


def check_sums(memory: PeerMemory) -> None:
    """Against float32 sums in rank order, for rows that are pushed, of one-shot and of two-shot."""
    weight = torch.rand(HIDDEN, dtype=torch.bfloat16, device="cuda") + 0.5
    dist.broadcast(weight, 0)
    for rows, first in ((1, 0), (11, 5), (12, 5), (64, 0), (300, 11), (1000, 0), (MOST_ROWS, 0)):
        residual = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
        dist.broadcast(residual, 0)
        expected = residual.clone()
        for turn in (2, 0, 1, 0, 1):
            if memory.rank == turn % memory.size:
                torch.cuda._sleep(2_000_000)
            own = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
            parts = [torch.empty_like(own) for _ in range(memory.size)]
            dist.all_gather(parts, own)
            part = memory.part(turn, first, rows)
            assert part is not None
            part.copy_(own)
            found = memory.add_norm(part, turn, first, residual, weight, EPS).clone()
            total = torch.zeros(rows, HIDDEN, device="cuda")
            for x in parts:
                total += x.float()
            expected = (total + expected.float()).to(torch.bfloat16)
            norm = kernels.rms_norm(expected, weight, EPS)
            torch.testing.assert_close(found.float(), norm.float(), rtol=2e-2, atol=1e-2)
            assert same_everywhere(found)
    assert memory.part(0, MOST_ROWS, 1) is None
    for values in (1, 3, 100_000):
        x = torch.randint(0, 2**62, (values,), device="cuda")
        everyone = [torch.empty_like(x) for _ in range(memory.size)]
        dist.all_gather(everyone, x)
        assert torch.equal(memory.gather(x), torch.stack(everyone))
    assert memory.peers.expired.item() == 0


def check_delays(memory: PeerMemory) -> None:
    """Replays of a graph, each rank late by something else every time."""
    for rows in (8, 40, 600):
        check_replays(memory, rows)


def check_replays(memory: PeerMemory, rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.rand(HIDDEN, dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(memory.size, rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    residual = torch.empty(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    found = torch.empty_like(residual)

    def layers() -> None:
        residual.fill_(0.5)
        for turn in (2, 0, 1, 0, 1, 0, 1):
            part = memory.part(turn, 0, rows)
            assert part is not None
            part.copy_(inputs[memory.rank])
            found.copy_(memory.add_norm(part, turn, 0, residual, weight, EPS))

    layers()
    expected = found.clone()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    delays = torch.Generator().manual_seed(memory.rank)
    for _ in range(REPLAYS):
        torch.cuda._sleep(int(torch.randint(0, 100_000, (1,), generator=delays)))
        graph.replay()
        wrong += (found != expected).sum()
    assert wrong.item() == 0
    assert memory.peers.expired.item() == 0


def check_silence(memory: PeerMemory) -> None:
    """Rank 1 does not come: the others' wait ends when they are told to, and says so."""
    if memory.rank == 1:
        return
    part = memory.part(0, 0, 4)
    assert part is not None
    residual = torch.zeros(4, HIDDEN, dtype=torch.bfloat16, device="cuda")
    # NOTE: here, as nothing launched after memory was pinned runs beside what was launched before.
    pinned, there = torch.ones(1).pin_memory(), torch.zeros(1, device="cuda")
    memory.add_norm(part, 0, 0, residual, residual[0], EPS)
    event = torch.cuda.Event()
    event.record()
    there.copy_(pinned, non_blocking=True)  # waits behind the kernel
    assert not event.query()
    begin = time.monotonic()
    memory.expire()
    event.synchronize()
    assert time.monotonic() - begin < 2  # by itself it would wait for 20
    assert memory.peers.expired.item() != 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("check", [check_sums, check_delays, check_silence])
def test_peer_memory(size, check):
    peer_ranks.run(size, check)
