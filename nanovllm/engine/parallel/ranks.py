"""The ranks of a tensor-parallel run: how they meet, talk, and notice each other's death.

Rank 0 holds scheduler and sampler; the others run whatever step it sends. A step travels as two
integer tensors by broadcast, sizes and contents, so nothing is ever unpickled.

- In a plain script rank 0 starts the others itself (`Ranks.spawn`), and they meet at a store on a
  free port of the loopback interface.
- Under torchrun all ranks exist already (`Ranks.join_torchrun`) and meet at its store; torchrun
  ends all if one fails.

Two process groups connect them: `control` (gloo) carries steps, and may stay silent for days;
`group` (NCCL on CUDA, else the same one) is the model's.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from time import monotonic

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nanovllm.config import Config
from nanovllm.engine.parallel import process_groups
from nanovllm.engine.parallel.processes import POLL_SECONDS, RankDiedError, Workers, WorkerTask
from nanovllm.engine.step_inputs import StepLayout
from nanovllm.layers.parallel import ParallelGroup

# How long processes may take to start and to meet, to be seen dead after an error, and to end.
JOIN_SECONDS = 300.0
DEATH_SECONDS = 2.0
END_SECONDS = 10.0

# Integers of a step's layout, and of its inputs; no layout: there will be no more steps.
HEADER_SIZE = 2
# Engines of a torchrun job share its store; all ranks make them in the same order.
_engine_ids = itertools.count()


class Ranks:
    """This process's place among the ranks; with one rank, every method is trivial."""

    def __init__(self) -> None:
        self.group = ParallelGroup()
        self.control: dist.ProcessGroup | None = None
        self.device = torch.device("cpu")
        self.workers = Workers()
        self.broken = False
        self._ended = threading.Event()
        self._nccl_watchdog: threading.Thread | None = None

    @classmethod
    def start(cls, config: Config, model_dir: Path, device: torch.device) -> Ranks:
        """Joins the ranks of torchrun if it runs and there is more than one; else starts them."""
        if dist.is_torchelastic_launched() and config.tensor_parallel_size > 1:
            return cls.join_torchrun(config, device)
        return cls.spawn(config, model_dir, device)

    @classmethod
    def spawn(cls, config: Config, model_dir: Path, device: torch.device) -> Ranks:
        """Starts ranks 1 to N - 1 as processes of this machine and joins them as rank 0.

        Raises:
            ValueError: there are not enough CUDA devices.
            RankDiedError: one of them ended before it joined.
        """
        ranks, size = cls(), config.tensor_parallel_size
        if size == 1:
            return ranks
        devices = devices_for(device, size)
        store, port = process_groups.serve_store(timedelta(seconds=JOIN_SECONDS))
        fields = dataclasses.asdict(config)
        threads = max(torch.get_num_threads() // size, 1)
        try:
            for rank in range(1, size):
                task = WorkerTask(
                    rank, size, port, str(model_dir), str(devices[rank]), threads, fields
                )
                ranks.workers.start(task)
            with process_groups.surviving_nccl_errors():
                ranks._while_workers_live(lambda: ranks._connect(store, 0, size, device))
        except BaseException:
            ranks._break()
            raise
        return ranks

    @classmethod
    def join(cls, task: WorkerTask) -> Ranks:
        """Joins as the worker that `task` describes."""
        ranks = cls()
        store = process_groups.visit_store(task.port, timedelta(seconds=JOIN_SECONDS))
        ranks._connect(store, task.rank, task.size, torch.device(task.device))
        return ranks

    @classmethod
    def join_torchrun(cls, config: Config, device: torch.device) -> Ranks:
        """Joins the ranks that torchrun started, through its own rendezvous.

        Raises:
            ValueError: torchrun started another number of processes, or the device is not there.
        """
        size, world = config.tensor_parallel_size, int(os.environ["WORLD_SIZE"])
        if world != size:
            raise ValueError(
                f"tensor_parallel_size={size} is not allowed under torchrun with {world} "
                f"processes: it must be {world}"
            )
        if config.device.startswith("cuda:"):
            raise ValueError(
                f"device={config.device!r} is not allowed under torchrun: every process needs a "
                "device of its own, so it must be 'cuda' or 'auto'"
            )
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices_for(torch.device(device.type, 0), local)
        store, rank, _ = next(rendezvous("env://"))
        prefix = f"nanovllm/{next(_engine_ids)}"
        ranks = cls()
        ranks._connect(dist.PrefixStore(prefix, store), rank, size, device, local == world)
        return ranks

    @property
    def is_first(self) -> bool:
        return self.group.rank == 0

    def send_step(self, layout: StepLayout, flat: np.ndarray) -> None:
        """Gives the other ranks a step to run; its plan goes as a number.

        Raises:
            RankDiedError: one of them has died.
        """
        if self.group.size > 1:
            self.workers.check()
            integers = np.array(layout.to_integers(), np.int32)
            self._broadcast(torch.tensor([len(integers), len(flat)], dtype=torch.int64))
            self._broadcast(torch.from_numpy(np.concatenate([integers, flat])))

    def receive_step(self) -> tuple[StepLayout, np.ndarray] | None:
        """Waits for the next step; None when there will be no more."""
        header = self._broadcast(torch.empty(HEADER_SIZE, dtype=torch.int64))
        width, size = header.tolist()
        if not width:
            return None
        body = self._broadcast(torch.empty(width + size, dtype=torch.int32)).numpy()
        return StepLayout.from_integers(body[:width].tolist()), body[width:]

    def minimum(self, value: int) -> int:
        """The smallest `value` of all ranks."""
        if self.group.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.control)
        return int(tensor)

    def wait(self, event: torch.cuda.Event) -> None:
        """Waits for `event`, which a collective with a dead rank would never let happen.

        Raises:
            RankDiedError: a worker has died, so that what came before the event is void.
        """
        if not self.workers.processes:
            event.synchronize()
            return
        while not event.query():
            self.workers.check()
        self.workers.check()

    @contextmanager
    def collective_region(self) -> Iterator[None]:
        """Surrounds what all ranks do together.

        Whatever breaks it off leaves them at different places for good, so then `broken` is set,
        the workers are killed, and `close` is all that can follow.

        Raises:
            RankDiedError: the death of a worker was behind the error.
        """
        try:
            yield
        except BaseException as error:
            if self.group.size == 1:
                raise
            # A collective fails a moment before the worker that broke it is seen dead.
            unexplained = isinstance(error, RuntimeError) and not isinstance(error, RankDiedError)
            death = self.workers.await_dead_worker(DEATH_SECONDS) if unexplained else None
            self._break()
            if death is None:
                raise
            raise death from error

    def close(self) -> None:
        """Ends the workers and leaves the groups; may be called twice.

        NOTE: CUDA graphs that hold NCCL collectives must be gone before, or NCCL waits for them.
        """
        if self.control is None:
            return
        if not self.broken:
            self._finish()
        self._ended.set()
        if self._nccl_watchdog is not None:
            self._nccl_watchdog.join(END_SECONDS)
        # The store lives here and goes last: workers look at it to their end.
        self.workers.end(END_SECONDS)
        self.control = None
        self.group = dataclasses.replace(self.group, process_group=None)

    def _connect(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        device: torch.device,
        one_machine: bool = True,
    ) -> None:
        """Meets the other ranks at `store`; returns when all of them have come."""
        control = process_groups.gloo_group(
            dist.PrefixStore("control", store), rank, size, one_machine
        )
        model, self.device = control, device
        if device.type == "cuda":
            torch.cuda.set_device(device)
            model = process_groups.nccl_group(dist.PrefixStore("model", store), rank, size)
            self._nccl_watchdog = threading.Thread(
                target=self._abort_at_end, args=(model,), daemon=True
            )
            self._nccl_watchdog.start()
            # Makes the communicator, here where `spawn` watches over the workers.
            dist.all_reduce(torch.zeros(1, device=device), group=model)
            torch.cuda.synchronize(device)
        self.control, self.group = control, ParallelGroup(rank, size, model)

    def _while_workers_live(self, task: Callable[[], None]) -> None:
        """Runs `task`, which may wait forever for a worker that has died.

        If one has, the thread that waits is left behind: nothing can wake it.
        """
        outcome: Future[None] = Future()

        def run() -> None:
            try:
                task()
                outcome.set_result(None)
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        deadline = monotonic() + JOIN_SECONDS
        while not wait([outcome], POLL_SECONDS).done:
            self.workers.check()
            if monotonic() > deadline:
                raise RankDiedError(f"the ranks did not meet within {JOIN_SECONDS:.0f} s")
        if outcome.exception() is not None:
            death = self.workers.await_dead_worker(DEATH_SECONDS)
            if death is not None:
                raise death from outcome.exception()
        outcome.result()

    def _abort_at_end(self, model: dist.ProcessGroup) -> None:
        """Aborts NCCL when the ranks part or close: no kernel waits for a dead rank after that.

        The only place that does so, in a thread of its own: the main thread may be inside a CUDA
        call that waits for such a kernel.
        """
        while not self._ended.wait(POLL_SECONDS) and self.workers.dead_worker() is None:
            pass
        process_groups.abort_nccl(model)

    def _break(self) -> None:
        self.broken = True
        self._ended.set()
        self.workers.end(patience=0)

    def _finish(self) -> None:
        """Says, as rank 0, that there are no more steps, and lets all ranks end theirs."""
        patience = timedelta(seconds=END_SECONDS)
        stop = torch.zeros(HEADER_SIZE, dtype=torch.int64)
        try:
            if self.is_first:
                dist.broadcast(stop, group=self.control, group_src=0, async_op=True).wait(patience)
            # NOTE: until its last kernel has ended, a rank may read the memory of the others.
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            dist.all_reduce(stop, group=self.control, async_op=True).wait(patience)
        except RuntimeError:  # one has died or does not listen
            self._break()

    def _broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.broadcast(tensor, group=self.control, group_src=0)
        return tensor


def devices_for(first: torch.device, size: int) -> list[torch.device]:
    """The devices of `size` ranks of this machine, from `first` on.

    Raises:
        ValueError: there are not enough.
    """
    if first.type != "cuda":
        return [first] * size
    start, present = first.index or 0, torch.cuda.device_count()
    if start + size > present:
        raise ValueError(
            f"tensor_parallel_size={size} is not allowed with device={str(first)!r}: this machine "
            f"has {present} CUDA device{'s' * (present != 1)}, and every rank needs one"
        )
    return [torch.device("cuda", start + rank) for rank in range(size)]
