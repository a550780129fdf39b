"""Attacks on the ranks of an engine: what is left, and after how many seconds.

    python tests/rank_attacks.py --count 40 --seed 1

Each attack starts a script with two ranks, waits for a moment of its run, and then stops, kills or
interrupts a rank, lets rank 0 fork and die, or sends noise to every port that the ranks listen on.
A dead or silent rank must be an error of rank 0 in time, and no process may be left; noise must
change nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import scripts
from tests.checkpoints import Shape

STEP_TIMEOUT = 4.0
# Beyond what the engine promises, on a busy machine.
SLACK = 6.0
ORPHAN_SECONDS = 5.0
MOMENTS = ["start", "prefill", "decode", "idle"]
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
}

# Says where it is, one word a line; ends with what it drew, or with the error.
RUN = """
import os, sys, threading, time
print("start", flush=True)
from nanovllm import LLM
from nanovllm.engine.parallel import ranks

device, model, step_timeout, fork_at, ranks.JOIN_SECONDS = (*sys.argv[1:5], 10.0)
ranks.LOAD_SECONDS = 10.0

def say(word):
    print(word, flush=True)
    if word == fork_at and os.fork() == 0:
        time.sleep(60)
        os._exit(0)

def watch(moment, step):
    if moment == "issued":
        say("decode" if step.is_decode else "prefill")

try:
    if fork_at == "start":
        say("start")
    llm = LLM(model, device=device, tensor_parallel_size=2, max_model_len=256, max_num_seqs=4,
              num_kvcache_blocks=64, kvcache_block_size=16, max_num_batched_tokens=16,
              step_timeout=float(step_timeout))
    llm.model_runner.watch = watch
    options = dict(temperature=0, max_tokens=200, ignore_eos=True, use_tqdm=False)
    prompts = [[5 + i % 9 for i in range(48)], [7, 8, 9]]
    for _ in range(2):
        tokens = [output["token_ids"] for output in llm.generate(prompts, **options)]
        say("idle")
        time.sleep(1.0)
    print("tokens", hash(str(tokens)), flush=True)
except ranks.RankDiedError as error:
    print("error", error, flush=True)
except KeyboardInterrupt:
    print("interrupt", flush=True)
"""


@dataclass(frozen=True)
class Attack:
    """What happens to whom, and when; `target` is a rank."""

    what: str
    target: int
    moment: str

    @classmethod
    def random(cls) -> Attack:
        what = random.choice([*SIGNALS, "fork", "strangers"])
        target = 0 if what == "fork" else random.randrange(2)
        return cls(what, target, random.choice(MOMENTS))


@dataclass
class Run:
    """The script, running."""

    process: subprocess.Popen[str]

    def read_until(self, moment: str, seconds: float = 60.0) -> str:
        """The first line from now on that begins with `moment`, or the last one."""
        assert self.process.stdout is not None
        line = ""
        while new := self.process.stdout.readline():
            line = new.strip()
            if line.startswith(moment):
                break
        return line

    def workers(self) -> list[int]:
        """Processes that rank 0 has started and that run the worker module."""
        return [pid for pid in children(self.process.pid) if b"worker" in command_line(pid)]

    def everyone(self) -> list[int]:
        return [self.process.pid, *children(self.process.pid)]


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(child) for child in task.read_text().split()]
        except FileNotFoundError:
            continue
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def send_noise(pids: list[int]) -> int:
    """Connects to every port, says something wrong, and leaves half of the connections open."""
    places = [place for pid in pids for place in scripts.listening_sockets(pid).values()]
    ports = {int(place.split(":")[1], 16) for place in places}
    for port in ports:
        for _ in range(3):
            try:
                stranger = socket.create_connection(("127.0.0.1", port), timeout=1)
                stranger.sendall(os.urandom(random.choice([1, 8, 100])))
                OPEN.append(stranger)
            except OSError:
                continue
    while len(OPEN) > 20:
        OPEN.pop(0).close()
    return len(ports)


OPEN: list[socket.socket] = []


def attack(case: Attack, model: Path, device: str, tokens: str) -> str:
    """Runs one; returns what came of it, which begins with "WRONG" if it is not right."""
    fork_at = case.moment if case.what == "fork" else ""
    run = Run(scripts.start("-c", RUN, device, model, STEP_TIMEOUT, fork_at))
    run.read_until(case.moment)
    if case.moment == "start":
        scripts.wait_for(lambda: bool(run.workers()), 30)
        time.sleep(random.random() * 2)
    else:
        time.sleep(random.random() * 0.05)
    workers, begin = run.workers(), time.monotonic()
    try:
        return _attack(case, run, workers, begin, tokens)
    finally:
        for pid in {*run.everyone(), *workers}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        run.process.communicate()


def _attack(case: Attack, run: Run, workers: list[int], begin: float, tokens: str) -> str:
    process = run.process
    if case.what == "strangers":
        ports = send_noise([process.pid, *workers])
        line = run.read_until("tokens")
        right = line == tokens and process.wait(30) == 0
        return f"{'' if right else 'WRONG '}{ports} ports, then: {line[:60]}"
    if case.what == "fork" or (case.target == 0 and case.what in ("kill", "term")):
        os.kill(process.pid, signal.SIGKILL if case.what == "fork" else SIGNALS[case.what])
        process.wait()
        taken = scripts.seconds_to_end(workers, ORPHAN_SECONDS)
        return "WRONG orphans" if taken is None else f"workers gone after {taken:.1f} s"
    target = process.pid if case.target == 0 else workers[0] if workers else None
    if target is None:
        return "no worker yet"
    os.kill(target, SIGNALS[case.what])
    if case.target == 0 and case.what == "stop":
        time.sleep(STEP_TIMEOUT + 2)
        left = sum(map(scripts.is_running, workers))
        process.kill()
        process.wait()
        taken = scripts.seconds_to_end(workers, ORPHAN_SECONDS)
        if taken is None:
            return "WRONG orphans"
        return f"{left} of {len(workers)} workers waited for it, then gone after {taken:.1f} s"
    expected = "interrupt" if case.target == 0 else "error"
    line = run.read_until(expected)
    allowed = (STEP_TIMEOUT if case.what == "stop" else 1.0) + SLACK
    if case.moment == "start":
        allowed += 10.0  # to meet
    taken = time.monotonic() - begin
    gone = scripts.wait_for(
        lambda: process.poll() is not None and not any(map(scripts.is_running, workers)), 15
    )
    right = line.startswith(expected) and taken < allowed and gone is not None
    return f"{'' if right else 'WRONG '}{taken:.1f} s: {line[:90]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="attacks, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--device", default="cpu", help="'cpu' or 'cuda'")
    parser.add_argument("--all", action="store_true", help="every attack once, instead")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    # In the background of a shell it would ignore interrupts, and so would what it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    cases = [Attack.random() for _ in range(arguments.count)]
    if arguments.all:
        cases = [
            Attack(what, target, at) for what in SIGNALS for target in (0, 1) for at in MOMENTS
        ]
        cases += [Attack(what, 0, at) for what in ("fork", "strangers") for at in MOMENTS]
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        model = Path(name)
        Shape(heads=8, kv_heads=2, seed=1).write(model)
        os.environ["PYTHONHASHSEED"] = "0"
        options = arguments.device, model, STEP_TIMEOUT, ""
        *_, tokens = scripts.output_of("-c", RUN, *options, timeout=120)
        assert tokens.startswith("tokens")
        for case in cases:
            outcome = attack(case, model, arguments.device, tokens)
            wrong += outcome.startswith("WRONG")
            print(f"{case.what:9} rank {case.target} at {case.moment:8} {outcome}", flush=True)
    print(json.dumps({"attacks": len(cases), "wrong": wrong}))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
