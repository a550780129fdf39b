"""The ranks of a tensor-parallel run: how they meet and talk, and notice a death or silence.

Rank 0 schedules; the others run whatever step it sends. A step travels as integers by broadcast, so
nothing is ever unpickled. It is sent ahead: nobody waits for a message within a step.

- In a plain script rank 0 starts the others itself (`Ranks.spawn`), and they meet at a file.
- Under torchrun all ranks exist already (`Ranks.join_torchrun`) and meet at its store; torchrun
  ends all if one fails.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import torch
import torch.distributed as dist

from green_ctx import GreenContextError
from nanovllm.config import Config
from nanovllm.engine.parallel.guard import Guard, silence
from nanovllm.engine.parallel.process_groups import (
    ProcessGroups,
    check_no_default_group,
    environment,
)
from nanovllm.engine.parallel.processes import (
    POLL_SECONDS,
    RankDiedError,
    Workers,
    WorkerTask,
    run_in_thread,
)
from nanovllm.engine.pipeline_modes import PipelineUnavailable
from nanovllm.engine.step_inputs import StepLayout
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.peer_memory import MOST_ROWS, PeerMemory
from nanovllm.utils.device import sm_count
from nanovllm.utils.joined import join, joined_size, split
from nanovllm.utils.waiting import complete

logger = logging.getLogger(__name__)

# How long processes may take to start and to meet, to load, to be seen dead after an error, and to
# end.
JOIN_SECONDS = 300.0
LOAD_SECONDS = 1800.0
DEATH_SECONDS = 2.0
END_SECONDS = 10.0

# Integers of a message's first part: as many of a step's joined arrays as it holds. All zeros:
# there are no more steps.
PACKET = 4096
# A token that a rank draws when it gave up waiting for the others.
VOID = -2
# Errors that say it already, or that no other rank causes.
EXPLAINED = (RankDiedError, PipelineUnavailable, GreenContextError)


class Ranks:
    """This process's place among the ranks; with one rank, every method is trivial."""

    def __init__(self) -> None:
        self.group = ParallelGroup()
        self.groups: ProcessGroups | None = None
        self.device = torch.device("cpu")
        self.step_timeout = 0.0
        self.workers = Workers()
        self.meeting = ""
        self.broken = False
        self._guard: Guard | None = None

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
        check_no_default_group()
        threads = max(torch.get_num_threads() // size, 1)
        ranks.meeting = tempfile.mkdtemp(prefix="nanovllm-")  # only this user's
        path = f"{ranks.meeting}/ranks"
        tasks = [
            WorkerTask(
                rank, size, os.getpid(), path, str(model_dir), str(devices[rank]), threads,
                dataclasses.asdict(config),
            )
            for rank in range(1, size)
        ]  # fmt: skip
        try:
            ranks.workers.start(tasks)
            # Before anything that waits for the workers without end.
            here = partial(ProcessGroups.workers_are_here, path, size)
            ranks._wait_until(here, "come", JOIN_SECONDS)
            # Or NCCL would end the whole process when a rank is lost.
            with environment(TORCH_NCCL_ASYNC_ERROR_HANDLING="0"):
                form = partial(ProcessGroups.meet, path, 0, size, device)
                meet = partial(ranks._meet, form, config, device)
                ranks._while_workers_live(meet, JOIN_SECONDS)
        except BaseException:
            ranks.break_off()
            ranks.close()
            raise
        return ranks

    @classmethod
    def join(cls, task: WorkerTask, config: Config) -> Ranks:
        """Joins as the worker that `task` describes."""
        ranks, device = cls(), torch.device(task.device)
        form = partial(ProcessGroups.meet, task.meeting, task.rank, task.size, device)
        ranks._meet(form, config, device)
        return ranks

    @classmethod
    def join_torchrun(cls, config: Config, device: torch.device) -> Ranks:
        """Joins the ranks that torchrun started, through its own rendezvous.

        Raises:
            ValueError: torchrun started another number of processes, or the device is not there.
            RankDiedError: the others do not come, who may have served another engine to its end.
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
        devices_for(torch.device(device.type, 0), int(os.environ["LOCAL_WORLD_SIZE"]))
        ranks, form = cls(), partial(ProcessGroups.of_torchrun, device)
        # One of another host may have to download the model first.
        ranks._while_workers_live(partial(ranks._meet, form, config, device), LOAD_SECONDS)
        return ranks

    @property
    def is_first(self) -> bool:
        return self.group.rank == 0

    def send_step(self, layout: StepLayout, flat: np.ndarray, draws: Sequence[np.ndarray]) -> None:
        """Gives the other ranks a step to run; RankDiedError: one of them has died.

        Its inputs `flat` and what is made of its logits, `draws`, are int32.
        """
        if self.group.size > 1:
            self.workers.check()
            message = join([np.array(layout.to_integers(), np.int32), flat, *draws])
            packet = np.zeros(PACKET, np.int32)
            packet[: len(message)] = message[:PACKET]
            for part in [packet, message[PACKET:]][: 1 + (len(message) > PACKET)]:
                complete(self._broadcast(torch.from_numpy(part)), self.step_timeout)

    def receive_step(self) -> tuple[StepLayout, np.ndarray, list[np.ndarray]] | None:
        """Waits for the next step, as it was sent; None when there will be no more."""
        packet = torch.empty(PACKET, dtype=torch.int32, device="cpu")
        self._broadcast(packet).wait()
        if not packet[0]:
            return None
        size = max(PACKET, joined_size(packet.numpy()))
        message = torch.empty(size, dtype=torch.int32, device="cpu")
        message[:PACKET] = packet
        if len(message) > PACKET:
            self._broadcast(message[PACKET:]).wait()
        integers, flat, *draws = split(message.numpy())
        return StepLayout.from_integers(integers.tolist()), flat, draws

    def connect(self, config: Config, dtype: torch.dtype, hidden: int) -> None:
        """Prepares the model's collectives, which go through memory that all ranks reach, or NCCL.

        NCCL takes seconds and memory, so it is left out where nothing needs it.
        `dtype` and `hidden` size are those of hidden states.
        """
        if self.group.size == 1 or self.device.type != "cuda":
            return
        if config.all_reduce != "nccl":
            self._share_memory(dtype, hidden)
        rows = max(config.max_num_batched_tokens, config.max_num_seqs)
        if self.group.peers is None or rows > MOST_ROWS:
            self._while_workers_live(self._start_nccl, JOIN_SECONDS)

    def _share_memory(self, dtype: torch.dtype, hidden: int) -> None:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.group.size))
        own, size = torch.cuda.current_device(), self.group.size
        first = own - self.group.rank
        reachable = local == size and all(
            torch.cuda.can_device_access_peer(own, other)
            for other in range(first, first + size)
            if other != own
        )
        sms = sm_count(self.device)  # a rank lays out its memory by them
        if not self.minimum(int(reachable)) or self.minimum(sms) != -self.minimum(-sms):
            return
        peers = None
        try:
            peers = PeerMemory(self.control, self.device, dtype, hidden, self.step_timeout)
        except GreenContextError as error:
            logger.warning("The ranks use NCCL, as they cannot share memory: %s", error)
        if self.minimum(int(peers is not None)):
            self.group = dataclasses.replace(self.group, peers=peers)
        elif peers is not None:
            peers.close()

    def _start_nccl(self) -> None:
        torch.cuda.set_device(self.device)  # also of the thread that runs this
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.group.process_group)
        torch.cuda.synchronize(self.device)

    def minimum(self, value: int) -> int:
        """The smallest `value` of all ranks, of which some may still be loading weights."""
        if self.group.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.int64, device="cpu")
        work = dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.control, async_op=True)
        complete(work, LOAD_SECONDS)
        return int(tensor)

    def check_equal(self, values: Sequence[object]) -> None:
        """Raises RuntimeError unless all ranks give values that print alike."""
        found = zlib.crc32(repr(values).encode())
        if self.minimum(found) != -self.minimum(-found):
            raise RuntimeError(f"the ranks' GPUs differ; rank {self.group.rank} has {values}")

    def wait(self, event: torch.cuda.Event, seconds: float | None = None) -> None:
        """Waits for `event`, which a dead or silent rank would never let happen.

        Raises:
            RankDiedError: then what came before the event is void. Silence lasts `step_timeout`, or
                `seconds`.
        """
        if self.group.size == 1:
            event.synchronize()
            return
        seconds = self.step_timeout if seconds is None else seconds
        deadline = monotonic() + seconds
        while not event.query():
            self.workers.check()
            if monotonic() > deadline:
                raise silence(seconds)
        self.workers.check()

    def mark_silence(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of a step on the device; others, that `check_silence` knows, if they are void."""
        peers = self.group.peers
        return tokens if peers is None else torch.where(peers.peers.expired != 0, VOID, tokens)

    def check_silence(self, tokens: torch.Tensor) -> None:
        """Raises RankDiedError if a kernel gave up waiting for another rank."""
        if self.group.peers is not None and (tokens == VOID).any():
            raise silence(self.step_timeout)

    def watch_step(self) -> None:
        """Lets this worker end if what was issued so far does not, within `step_timeout`."""
        if self._guard is not None:
            self._guard.watch_step()

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
            death = None
            if isinstance(error, (RuntimeError, TimeoutError)) and not isinstance(error, EXPLAINED):
                # A collective fails a moment before the worker that broke it is seen dead.
                death = self.workers.await_dead_worker(DEATH_SECONDS)
            self.break_off()
            if isinstance(error, TimeoutError):
                death = death or silence(self.step_timeout)
            if death is None:
                raise
            raise death from error

    def break_off(self) -> None:
        """Kills the workers and ends all waits, of ranks that are at different places for good."""
        self.broken = True
        if self._guard is not None:
            self._guard.part()
        self.workers.end(patience=0)

    def close(self) -> None:
        """Ends the workers and leaves the groups; may be called twice.

        NOTE: CUDA graphs that hold NCCL collectives must be gone before, or NCCL waits for them.
        """
        if self.groups is None:
            shutil.rmtree(self.meeting, ignore_errors=True)
            return
        if not self.broken:
            self._finish()
        if self._guard is not None:
            self._guard.part()
            self._guard.join(END_SECONDS)
        self.workers.end(END_SECONDS)
        try:
            if self.group.peers is not None:
                self.group.peers.close()
        except RuntimeError as error:
            if not self.broken:
                raise
            # What broke it is being told; the memory of a rank that is gone may give any error.
            logger.warning("Shared memory was not given back: %s", error)
        finally:
            self.groups.close()
            shutil.rmtree(self.meeting, ignore_errors=True)
        # Only now, so that a close that was interrupted can be repeated.
        self.group, self.groups = ParallelGroup(self.group.rank, self.group.size), None

    def _meet(
        self, form: Callable[[], ProcessGroups], config: Config, device: torch.device
    ) -> None:
        """Goes on with the groups that `form` gives once all ranks have come."""
        if device.type == "cuda":
            torch.cuda.set_device(device)  # also of the thread that runs this
        groups = form()
        self.groups, self.device, self.step_timeout = groups, device, config.step_timeout
        self.group = ParallelGroup(
            dist.get_rank(groups.control),
            config.tensor_parallel_size,
            groups.model,
            config.step_timeout,
        )
        if device.type == "cuda":
            self._guard = Guard(
                self.group.rank, self.workers, device, self.step_timeout, self._end_waits
            )

    def _wait_until(self, done: Callable[[], bool], what: str, seconds: float) -> None:
        """Waits until it is `done`, as long as all workers live; errors call it `what`."""
        deadline = monotonic() + seconds
        while not done():
            self.workers.check()
            if monotonic() > deadline:
                raise RankDiedError(f"the ranks did not {what} within {seconds:.0f} s")
            sleep(POLL_SECONDS)

    def _while_workers_live(self, task: Callable[[], None], seconds: float) -> None:
        """Runs `task`, which may wait forever for a rank that has died or does not come.

        If one has, or after `seconds`, the thread that waits is left behind: nothing can wake it.
        """
        outcome = run_in_thread(task)
        try:
            self._wait_until(outcome.done, "meet", seconds)
        except RankDiedError:
            raise
        except BaseException:  # an interrupt: the workers live, so the task will end
            futures.wait([outcome], END_SECONDS)
            raise
        if outcome.exception() is not None:
            death = self.workers.await_dead_worker(DEATH_SECONDS)
            if death is not None:
                raise death from outcome.exception()
        outcome.result()

    def _end_waits(self) -> None:
        if self.group.peers is not None:
            self.group.peers.expire()
        if self.groups is not None:
            self.groups.abort()

    @property
    def control(self) -> dist.ProcessGroup:
        assert self.groups is not None
        return self.groups.control

    def _finish(self) -> None:
        """Says, as rank 0, that there are no more steps, and lets all ranks end theirs."""
        patience = timedelta(seconds=END_SECONDS)
        stop = torch.zeros(PACKET, dtype=torch.int32, device="cpu")
        try:
            if self.is_first:
                self._broadcast(stop).wait(patience)
            if self.group.peers is not None:
                self.group.peers.disconnect()
            dist.all_reduce(stop, group=self.control, async_op=True).wait(patience)
        except (RuntimeError, ValueError):  # one has died or does not listen, or all have left
            self.break_off()

    def _broadcast(self, tensor: torch.Tensor) -> dist.Work:
        return dist.broadcast(tensor, group=self.control, group_src=0, async_op=True)


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
