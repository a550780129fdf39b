"""The worker processes that rank 0 starts: how they get their task, live, die and end.

A worker's standard input is a pipe from rank 0. Its first line is the task; its end, which comes
however rank 0 ends, is the end of the worker too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

POLL_SECONDS = 0.05


class RankDiedError(RuntimeError):
    """A worker process ended although the engine still needs it."""


@dataclass(frozen=True)
class WorkerTask:
    """What rank 0 tells a worker, as one line of JSON.

    Attributes:
        rank, size: which rank the worker is, and of how many.
        port: of the store on the loopback interface at which the ranks meet.
        model_dir: directory of the checkpoint.
        device: as torch spells it.
        num_threads: for torch on the CPU.
        config: fields of `Config`.
    """

    rank: int
    size: int
    port: int
    model_dir: str
    device: str
    num_threads: int
    config: dict[str, Any]


class Workers:
    """Ranks 1 to N - 1 as processes of this machine; none under torchrun or with one rank."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, task: WorkerTask) -> None:
        """Starts the worker of the next rank."""
        # Modules are found where this process finds them, and nowhere else first.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
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


def _describe_end(status: int) -> str:
    if status < 0:
        names = {known.value: known.name for known in signal.Signals}  # not of all real-time ones
        return f"was killed by {names.get(-status, f'signal {-status}')}"
    return f"ended with exit status {status}; its own message is above"
