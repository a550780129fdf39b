"""Runs user scripts as processes of their own, plainly or under torchrun, and breaks workers."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
LISTEN = "0A"  # in /proc/net/tcp


def start(script: Path | str, *args: object, processes: int = 0) -> subprocess.Popen[str]:
    """Starts `script`; with `processes`, a file as that many under torchrun.

    With "-c" or "-m" instead of it, a program or a module comes next.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, *(launcher if processes else []), str(script), *map(str, args)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    script: Path | str, *args: object, processes: int = 0, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    """Runs `script` to its end."""
    process = start(script, *args, processes=processes)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def output_of(script: Path | str, *args: object, **options: Any) -> list[str]:
    """The lines that `script` prints, which must end without an error."""
    done = run(script, *args, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def is_running(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not Path("/proc/self").exists()  # no /proc on this system, or gone just now


def wait_for(what: Callable[[], bool], seconds: float) -> float | None:
    """Seconds until it holds; None if it does not within that time."""
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        if what():
            return time.monotonic() - begin
        time.sleep(0.02)
    return None


def seconds_to_end(pids: Sequence[int], seconds: float) -> float | None:
    """The same of the end of all these processes."""
    return wait_for(lambda: not any(map(is_running, pids)), seconds)


def listening_sockets(pid: int) -> dict[str, str]:
    """Where a process accepts TCP connections: address:port in hexadecimal, by socket."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):  # it has been closed
            sockets.add(os.readlink(link))
    places = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, place, _, state, *_ = fields = line.split()
            name = f"socket:[{fields[9]}]"
            if state == LISTEN and name in sockets:
                places[name] = place
    return places


KILL = "os.kill(os.getpid(), signal.SIGKILL)"
RAISE = "raise ValueError('broken on purpose')"


def broken_interpreter(directory: Path, place: str, death: str, call: int = 1) -> Path:
    """A `sys.executable` whose workers meet `death` when they call the function at `place`.

    Args:
        directory: for the files it consists of.
        place: of `model_runner` or `process_groups`.
        death: a statement.
        call: number of the call that does it.
    """
    worker = directory / "worker.py"
    worker.write_text(
        f"import itertools, os, signal\n"
        f"from nanovllm.engine import model_runner\n"
        f"from nanovllm.engine.parallel import process_groups, worker\n"
        f"calls, healthy = itertools.count(1), {place}\n"
        f"def die(*args, **kwargs):\n"
        f"    if next(calls) < {call}:\n"
        f"        return healthy(*args, **kwargs)\n"
        f"    {death}\n"
        f"{place} = die\n"
        f"worker.main()\n"
    )
    interpreter = directory / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{worker}"\n')
    interpreter.chmod(0o700)
    return interpreter
