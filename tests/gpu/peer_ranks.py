"""Ranks of one host, a process and a GPU each, that share memory; for tests and timings."""

import argparse
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nanovllm.layers.peer_memory import PeerMemory

HIDDEN = 4096


def run(size: int, work: Callable[..., None], *args: Any) -> None:
    """Calls `work(peer memory, *args)` on each rank; an error of one is one of this call."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(_rank, (size, store.port, work, args), nprocs=size)


def run_command(description: str | None, work: Callable[..., None], file: str) -> None:
    """Runs `work(peer memory, path)` as the command line says; `file` is the default path."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="GPUs to use")
    parser.add_argument("--json", default=file, help="where to write the figures")
    arguments = parser.parse_args()
    run(arguments.ranks, work, arguments.json)


def _rank(rank: int, size: int, port: int, work: Callable[..., None], args: Any) -> None:
    torch.cuda.set_device(rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=rank, world_size=size)
    group = dist.group.WORLD
    assert group is not None
    memory = PeerMemory(group, torch.device("cuda", rank), torch.bfloat16, HIDDEN, timeout=20.0)
    work(memory, *args)
    memory.disconnect()
    dist.barrier()
    memory.close()
    dist.destroy_process_group()
