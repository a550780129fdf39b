"""What ranks know of each other and of the model, without any being started."""

import itertools
import os
import signal
import subprocess
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanovllm import LLM
from nanovllm.config import Config
from nanovllm.engine.parallel import process_groups
from nanovllm.engine.parallel.guard import Guard
from nanovllm.engine.parallel.processes import RankDiedError, Workers
from nanovllm.engine.parallel.ranks import Ranks, devices_for
from nanovllm.layers.embedding import VocabEmbedding
from nanovllm.layers.parallel import ParallelGroup, Shard
from tests.interrupts import Interrupt, InterruptAt

SECONDS = 60.0  # for what takes a moment, on a busy machine


@pytest.fixture
def no_processes(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.usefixtures("no_processes")
def test_sizes_that_do_not_divide_the_model_are_refused():
    with pytest.raises(ValueError, match=r"tensor_parallel_size=3 .* num_attention_heads=\d+"):
        LLM(device="cpu", tensor_parallel_size=3)


@pytest.mark.usefixtures("no_processes")
def test_torchrun_with_another_number_of_processes_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2 .* 4 processes.* must be 4"):
        LLM(device="cpu", tensor_parallel_size=2)


class Waiting:
    """Collectives of CUDA that may wait for a rank, without CUDA."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def abort(self) -> None:
        self.ended.append("nccl")

    def expire(self) -> None:
        self.ended.append("peers")


@pytest.mark.parametrize("end", ["death", "break", "close"])
def test_what_waits_for_a_rank_is_ended_if_it_is_dead_or_silent_or_the_ranks_part(end):
    rank_0, waiting = Ranks(), Waiting()
    rank_0.groups = waiting
    rank_0.group = ParallelGroup(0, 2, peers=waiting)
    worker = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    rank_0.workers.processes.append(worker)
    guard = Guard(0, rank_0.workers, torch.device("cpu"), SECONDS, rank_0._end_waits)
    rank_0._guard = guard
    time.sleep(0.2)
    assert waiting.ended == []
    if end == "death":
        worker.kill()
    elif end == "break":
        rank_0.break_off()
    else:
        guard.part()
    guard.join(SECONDS)
    assert waiting.ended == ["peers", "nccl"]
    rank_0.workers.end(patience=0)


@pytest.mark.parametrize(
    ("all_reduce", "reachable", "tokens", "shares", "starts"),
    [("auto", True, 2048, 1, 0), ("auto", True, 2049, 1, 1), ("auto", False, 10, 1, 1),
     ("nccl", True, 10, 0, 1)],
)  # fmt: skip
def test_nccl_is_started_only_where_it_is_needed(
    monkeypatch, all_reduce, reachable, tokens, shares, starts
):
    ranks, done = Ranks(), []

    def share(*_: object) -> None:
        done.append("share")
        if reachable:
            ranks.group = ParallelGroup(0, 2, peers=Waiting())

    monkeypatch.setattr(ranks, "_share_memory", share)
    monkeypatch.setattr(ranks, "_start_nccl", lambda: done.append("start"))
    ranks.device, ranks.group = torch.device("cuda", 0), ParallelGroup(0, 2)
    config = Config(all_reduce=all_reduce, max_num_batched_tokens=tokens, max_num_seqs=8)
    ranks.connect(config, torch.bfloat16, 64)
    assert (done.count("share"), done.count("start")) == (shares, starts)


def test_more_ranks_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_for(torch.device("cuda", 0), 2)[1] == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="tensor_parallel_size=2 is not allowed with device="):
        devices_for(torch.device("cuda", 1), 2)


@pytest.mark.parametrize("full", [1, 5, 8, 509])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary_shards_cover_everything_once(full, size):
    groups = [ParallelGroup(rank, size) for rank in range(size)]
    for shards in (
        [Shard.of(full, group) for group in groups],
        [Shard.of_tiles(full, 4, group) for group in groups],
    ):
        held = [entry for s in shards for entry in range(s.start, s.start + s.size)]
        assert held == list(range(full))
    assert all(s.start % 4 == 0 or s.size == 0 for s in shards)


def test_each_rank_has_the_kv_head_of_its_query_heads():
    """8 query heads on 4 ranks: rank r has 2r and 2r + 1, which share KV head (2r) // 4."""
    groups = [ParallelGroup(rank, 4) for rank in range(4)]
    starts = [Shard.of_kv_heads(2, 64, group).start // 64 for group in groups]
    assert starts == [0, 0, 1, 1]
    assert [Shard.of_kv_heads(8, 64, group).size // 64 for group in groups] == [2] * 4


def test_a_close_that_was_interrupted_at_any_line_can_be_repeated(tmp_path):
    for line in itertools.count(1):
        ranks = Ranks()
        ranks.meeting = str(tmp_path / str(line))
        os.mkdir(ranks.meeting)
        place, cpu = f"{ranks.meeting}/ranks", torch.device("cpu")
        ranks._meet(partial(process_groups.ProcessGroups.meet, place, 0, 1, cpu), Config(), cpu)
        at = InterruptAt(line, [str(Path(process_groups.__file__).parent)])
        with suppress(Interrupt), at:
            ranks.close()
        ranks.close()
        assert not dist.is_initialized()
        assert not os.path.exists(ranks.meeting)
        if not at.reached:
            break
    assert line > 20


def test_one_rank_needs_no_collectives():
    x = torch.randn(3, 4)
    assert ParallelGroup().all_reduce(x) is x
    assert torch.equal(ParallelGroup().gather(x), x[None])


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 1, r"signal \d+")]
)
def test_a_worker_that_any_signal_killed_is_said_to_be_dead(number, name):
    workers = Workers()
    workers.processes.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE))
    workers.processes[0].send_signal(number)
    assert workers.processes[0].wait(SECONDS) == -number
    with pytest.raises(RankDiedError, match=f"^rank 1 of 2 was killed by {name}$"):
        workers.check()
    workers.end(patience=0)


def test_a_weight_that_is_not_finite_spoils_the_tokens_of_its_row_alone():
    """A rank looks up its first row for the tokens that it does not hold."""
    embedding = VocabEmbedding(10_000, 4, ParallelGroup(0, 2))
    torch.nn.init.normal_(embedding.weight)
    embedding.weight[0] = torch.inf
    rows = embedding._own_rows(torch.tensor([0, 1, 9_999]))
    assert rows[0].isinf().all()
    assert torch.equal(rows[1:], torch.stack([embedding.weight[1], torch.zeros(4)]))
