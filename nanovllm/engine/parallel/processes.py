"""The worker processes that rank 0 starts: how they get their task, live, die and end.

A worker's standard input is a pipe from rank 0. Its first line is the task; its end is the end of
the worker too. As a child that rank 0 forked may hold the pipe open, and a stopped worker reads
nothing, Linux also kills workers when the thread ends that started them, which is one that lives as
long as they are wanted.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


class RankDiedError(RuntimeError):
    """A rank ended, or fell silent, although the engine still needs it."""


@dataclass(frozen=True)
class WorkerTask:
    """What rank 0 tells a worker, as one line of JSON."""

    rank: int
    size: int
    parent: int  # process id of rank 0
    meeting: str  # file at which the ranks meet
    model_dir: str
    device: str  # as torch spells it
    num_threads: int  # for torch on the CPU
    config: dict[str, Any]  # fields of `Config`


class Workers:
    """Ranks 1 to N - 1 as processes of this machine; none under torchrun or with one rank."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []
        self._unwanted = threading.Event()

    def start(self, tasks: Iterable[WorkerTask]) -> None:
        """Starts the workers, all of them, from a thread that lives as long as they are wanted."""

        def start_all() -> None:
            for task in tasks:
                self._start(task)

        run_in_thread(start_all, then=self._unwanted.wait).result()

    def _start(self, task: WorkerTask) -> None:
        # Modules are found where this process finds them, and nowhere else first.
        entries = [entry for entry in sys.path if isinstance(entry, str)]  # others find nothing
        path = os.pathsep.join(entry or os.getcwd() for entry in entries)
        process = subprocess.Popen(
            [sys.executable, "-m", "nanovllm.engine.parallel.worker"],
            stdin=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            # Ctrl-C in a terminal is for rank 0 alone, which then ends the others.
            start_new_session=True,
        )
        self.processes.append(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # dead already: `check` will tell
            process.stdin.write(json.dumps(dataclasses.asdict(task)).encode() + b"\n")
            process.stdin.flush()

    def dead_worker(self) -> RankDiedError | None:
        """An error that describes the first worker that has ended, if one has."""
        for rank, process in enumerate(self.processes, start=1):
            if process.poll() is not None:
                size = len(self.processes) + 1
                return RankDiedError(f"rank {rank} of {size} {_describe_end(process.returncode)}")
        return None

    def check(self) -> None:
        """Raises RankDiedError if a worker has ended."""
        death = self.dead_worker()
        if death is not None:
            raise death

    def await_dead_worker(self, seconds: float) -> RankDiedError | None:
        """As `dead_worker`, but gives a worker that is about to end some time to do so."""
        deadline = time.monotonic() + seconds
        while self.processes and time.monotonic() < deadline:
            death = self.dead_worker()
            if death is not None:
                return death
            time.sleep(POLL_SECONDS)
        return None

    def end(self, patience: float) -> None:
        """Waits until all have ended by themselves; kills those that have not after `patience`."""
        deadline = time.monotonic() + patience
        for process in self.processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        self.processes = []
        self._unwanted.set()


def run_in_thread(
    task: Callable[[], None], then: Callable[[], object] = lambda: None
) -> Future[None]:
    """The outcome of `task`, which a daemon thread runs, and `then` behind it."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            task()
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)
        then()

    threading.Thread(target=run, daemon=True).start()
    return outcome


def end_with(parent: int) -> None:
    """Ends this process when the process `parent`, which started it, does so.

    May return late or never, so it needs a thread of its own.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == parent:
        while os.read(sys.stdin.fileno(), 1):
            pass
    # NOTE: not sys.exit: the main thread may be inside a collective that will never return.
    os._exit(1)


def _describe_end(status: int) -> str:
    if status < 0:
        names = {known.value: known.name for known in signal.Signals}  # not of all real-time ones
        return f"was killed by {names.get(-status, f'signal {-status}')}"
    return f"ended with exit status {status}; its own message is above"
