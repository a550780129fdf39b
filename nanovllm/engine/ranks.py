"""The processes of a tensor-parallel run: how they start, talk, and notice each other's death.

Rank 0 holds scheduler and sampler; the others run whatever step it sends. A step travels as two
integer tensors by broadcast, so nothing is ever unpickled.

- In a plain script rank 0 starts the others itself (`Ranks.spawn`). They meet at a store on a free
  port of the loopback interface, and each ends when the pipe to rank 0 closes.
- Under torchrun all ranks exist already (`Ranks.join_torchrun`); torchrun ends all if one fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.step_inputs import InputLayout
from nanovllm.layers.parallel import ParallelGroup

BACKEND = "cpu:gloo,cuda:nccl"
# Workers wait for the next step as long as the user thinks; death is noticed otherwise.
PATIENCE = timedelta(days=365)
# How long a process may take to start and import torch, and to be seen dead or to end.
JOIN_SECONDS = 300.0
END_SECONDS = 10.0


class RankDiedError(RuntimeError):
    """A worker process ended although the engine still needs it."""


@dataclass
class Ranks:
    """This process's place among the ranks; with one rank, every method is trivial."""

    group: ParallelGroup = field(default_factory=ParallelGroup)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    owns_process_group: bool = False

    @classmethod
    def spawn(cls, config: Config, model_dir: Path, device: torch.device) -> Ranks:
        """Starts ranks 1 to N - 1 as processes of this machine and joins them as rank 0.

        Raises:
            RankDiedError: one of them ended before it joined.
        """
        if config.tensor_parallel_size == 1:
            return cls()
        size = config.tensor_parallel_size
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks = cls(owns_process_group=True)
        try:
            for rank in range(1, size):
                task = WorkerTask(
                    rank, size, store.port, str(model_dir), device.type, dataclasses.asdict(config)
                )
                ranks.workers.append(task.start())
            ranks._await_workers(store)
            ranks.group = _join(store, 0, size)
        except BaseException:
            ranks.close()
            raise
        return ranks

    @classmethod
    def join(cls, task: WorkerTask) -> Ranks:
        """Joins as the worker that `task` describes."""
        store = dist.TCPStore("127.0.0.1", task.port, timeout=timedelta(seconds=JOIN_SECONDS))
        store.set(_joined_key(task.rank), "1")
        return cls(_join(store, task.rank, task.size), owns_process_group=True)

    @classmethod
    def join_torchrun(cls, size: int) -> Ranks:
        """Joins the ranks that torchrun started, through its own rendezvous.

        Raises:
            ValueError: torchrun started another number of processes.
        """
        world = int(os.environ["WORLD_SIZE"])
        if world != size:
            raise ValueError(
                f"tensor_parallel_size={size} is not allowed under torchrun with {world} "
                f"processes: it must be {world}"
            )
        owns = not dist.is_initialized()
        if owns:
            dist.init_process_group(BACKEND, timeout=PATIENCE)
        process_group = dist.new_group(backend=BACKEND, timeout=PATIENCE)
        return cls(ParallelGroup(dist.get_rank(), size, process_group), owns_process_group=owns)

    @property
    def is_first(self) -> bool:
        return self.group.rank == 0

    def send_step(self, layout: InputLayout, flat: np.ndarray) -> None:
        """Gives the other ranks a step to run."""
        if self.group.size > 1:
            self._broadcast(torch.tensor([1, *dataclasses.astuple(layout)], dtype=torch.int64))
            self._broadcast(torch.from_numpy(flat))

    def receive_step(self) -> tuple[InputLayout, np.ndarray] | None:
        """Waits for the next step; None when there will be no more."""
        header = torch.empty(1 + len(dataclasses.fields(InputLayout)), dtype=torch.int64)
        more, is_decode, *sizes = self._broadcast(header).tolist()
        if not more:
            return None
        layout = InputLayout(bool(is_decode), *sizes)
        flat = torch.empty(layout.size, dtype=torch.int32)
        return layout, self._broadcast(flat).numpy()

    def minimum(self, value: int) -> int:
        """The smallest `value` of all ranks."""
        if self.group.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group.process_group)
        return int(tensor)

    def wait(self, event: torch.cuda.Event) -> None:
        """Waits for `event`, which a collective with a dead rank would never let happen."""
        if not self.workers:
            event.synchronize()
            return
        while not event.query():
            self.check()

    def check(self) -> None:
        """Raises RankDiedError if a worker has ended."""
        for rank, worker in enumerate(self.workers, start=1):
            if worker.poll() is not None:
                raise RankDiedError(
                    f"rank {rank} of {len(self.workers) + 1} died with exit status "
                    f"{worker.returncode}; its own message is above"
                )

    def explain(self, error: RuntimeError) -> None:
        """Raises RankDiedError if the death of a worker is behind a failed collective."""
        deadline = time.monotonic() + (1.0 if self.workers else 0.0)
        while time.monotonic() < deadline:
            try:
                self.check()
            except RankDiedError as death:
                raise death from error
            time.sleep(0.02)

    def close(self) -> None:
        """Ends the workers, politely if they listen, and leaves the process group."""
        alive = all(worker.poll() is None for worker in self.workers)
        if self.is_first and self.group.size > 1 and alive:
            stop = torch.zeros(1 + len(dataclasses.fields(InputLayout)), dtype=torch.int64)
            self._broadcast(stop)
        for worker in self.workers:
            _end(worker, patience=END_SECONDS if alive and self.group.size > 1 else 0.0)
        self.workers = []
        if self.owns_process_group and dist.is_initialized():
            dist.destroy_process_group()
        self.group = ParallelGroup()

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, group=self.group.process_group, group_src=0)
        return tensor

    def _await_workers(self, store: dist.TCPStore) -> None:
        deadline = time.monotonic() + JOIN_SECONDS
        keys = [_joined_key(rank) for rank in range(1, len(self.workers) + 1)]
        while not store.check(keys):
            self.check()
            if time.monotonic() > deadline:
                raise RankDiedError(f"the workers did not start within {JOIN_SECONDS:.0f} s")
            time.sleep(0.05)


@dataclass(frozen=True)
class WorkerTask:
    """What rank 0 tells a worker on its standard input, as one line of JSON."""

    rank: int
    size: int
    port: int
    model_dir: str
    device_type: str
    config: dict[str, Any]

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the worker; its standard input stays open as long as this process lives."""
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        worker = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.engine.worker"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(dataclasses.asdict(self)).encode() + b"\n")
        worker.stdin.flush()
        return worker


def _joined_key(rank: int) -> str:
    return f"joined/{rank}"


def _join(store: dist.Store, rank: int, size: int) -> ParallelGroup:
    if dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is in use in this process already: close the other engine first"
        )
    dist.init_process_group(BACKEND, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    return ParallelGroup(rank, size, dist.group.WORLD)


def _end(worker: subprocess.Popen[bytes], patience: float) -> None:
    try:
        worker.wait(patience)
    except subprocess.TimeoutExpired:
        worker.kill()
        worker.wait()
    if worker.stdin is not None:
        worker.stdin.close()
