"""Tries sound checkpoints of many spellings, and damaged ones, against transformers.

    python tests/fuzz_checkpoints.py --variants 300 --mutations 3000 --seed 1

A sound one must load and say what transformers says. A damaged one must end within the time and
memory below, run no code, and either be refused with an error that names a file or a field, or say
what transformers says of it, or nothing where its logits are no numbers there either; where
transformers does not load it, what was said before the damage.
Runs happen in a worker process with limited memory, which is ended if one hangs.
"""

import argparse
import contextlib
import logging
import logging.handlers
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nanovllm import LLM  # noqa: E402
from tests.checkpoint_mutations import add_tokenizer, mutate  # noqa: E402
from tests.checkpoint_variants import (  # noqa: E402
    ENGINE,
    NO_NUMBERS,
    complete,
    oracle_tokens,
    write_variant,
)
from tests.checkpoints import FIELD_NAMES  # noqa: E402

SECONDS = 10.0
MEMORY = 1 << 30
RUNS_PER_WORKER = 500
RUNS_PER_BASE = 25
CANARY = "canary-was-run"
FAULTS = ("code run", "silently other", "hang", "memory", "unnamed error")


class Worker:
    """A process that runs checkpoints, one at a time; started again after a hang or a crash."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None
        self.runs = 0

    def run(self, **request: Any) -> dict[str, Any]:
        """The result of `run_one`, or {"fault": ...} if there is none."""
        if self.process is None or self.runs >= RUNS_PER_WORKER:
            self.start()
        self.runs += 1
        self.pipe.send(request)
        try:
            if self.pipe.poll(SECONDS + 20):  # the oracle's time is not the engine's
                return self.pipe.recv()
            fault = "hang"
        except (EOFError, ConnectionError):
            fault = "memory"
        self.close()
        return {"fault": fault}

    def start(self) -> None:
        self.close()
        self.runs = 0
        os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # or else its end would go unnoticed
        assert self.pipe.poll(120)
        self.pipe.recv()

    def close(self) -> None:
        if self.process is not None:
            self.pipe.close()
            self.process.join(1)
            self.process.kill()
            self.process.join()
            self.process = None


def serve(pipe: Connection) -> None:
    """The worker: answers requests, and says "y" to whoever asks on stdin."""
    with tempfile.TemporaryFile() as answers:
        answers.write(b"y\n" * 100)
        answers.seek(0)
        os.dup2(answers.fileno(), 0)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MEMORY,) * 2)
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # the pipe was closed
        while True:
            pipe.send(run_one(**pipe.recv()))


def run_one(
    directory: str, expected: list[int] | None = None, load_format: str = "auto"
) -> dict[str, Any]:
    """Loads one checkpoint: what the engine said and took, and what transformers says."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.monotonic()
    result: dict[str, Any] = {"error": None, "tokens": None}
    longest, warnings = 0, logging.handlers.BufferingHandler(100)
    logging.getLogger("nanovllm").addHandler(warnings)
    try:
        with LLM(directory, **ENGINE, load_format=load_format) as llm:
            output = complete(llm)
            result["tokens"] = output["token_ids"]
            longest = llm.model_runner.max_model_len
            if llm.tokenizer is not None:
                llm.tokenizer.decode(llm.tokenizer.encode("Once upon a time"))
            if output["finish_reason"] == "error":
                result["tokens"].append(NO_NUMBERS)
                messages = "; ".join(record.getMessage() for record in warnings.buffer)
                if ".safetensors" in messages:
                    raise ValueError(messages)
    except BaseException as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result["kind"] = [base.__name__ for base in type(error).__mro__]
    finally:
        logging.getLogger("nanovllm").removeHandler(warnings)
    result["seconds"] = time.monotonic() - start
    result["growth"] = memory("VmHWM") - before
    if result["error"] is None and load_format == "auto":
        try:
            result["oracle"] = oracle_tokens(Path(directory), longest)
        except BaseException as error:
            result["oracle"], result["oracle_error"] = expected, f"{type(error).__name__}: {error}"
    return result


def memory(field: str) -> int:
    """Bytes of this process, as in /proc/self/status."""
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def verdict(result: dict[str, Any], names: set[str]) -> str:
    """How a run ended: loaded, refused, or a fault; an error must hold one of `names`."""
    if "fault" in result:
        return result["fault"]
    if result["seconds"] > SECONDS:
        return "hang"
    if result["growth"] > MEMORY:
        return "memory"
    error = result["error"]
    if error is None:
        same = result.get("oracle", result["tokens"]) == result["tokens"]
        return "loaded" if same else "silently other"
    known = {"ValueError", "FileNotFoundError", "MemoryError"} & set(result["kind"])
    return "refused" if known and any(name in error for name in names) else "unnamed error"


def try_variants(worker: Worker, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """The verdict on each sound variant, and what it was."""
    for number in range(count):
        with tempfile.TemporaryDirectory() as directory:
            what = write_variant(Path(directory), seed * 1_000_000 + number)
            result = worker.run(directory=directory)
            found = verdict(result, set())
            if found == "loaded" and result.get("oracle_error"):
                found = "not loaded by transformers"
            yield found, f"{what}: {result}"


def try_mutations(worker: Worker, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """The verdict on each damaged checkpoint, and what was done to it."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        base, directory, trace = (Path(folder, name) for name in ("sound", "damaged", CANARY))
        expected = base_tokens = None
        for number in range(count):
            if number % RUNS_PER_BASE == 0:
                write_base(base, rng)
                base_tokens = worker.run(directory=str(base))["tokens"]
            if not directory.exists():
                shutil.copytree(base, directory, symlinks=True)
                write_canary(directory, trace)
                expected = base_tokens
            one = random.Random(rng.randrange(10**9))
            what = mutate(directory, one)
            dummy = what.startswith("config.json") and one.random() < 0.15
            result = worker.run(
                directory=str(directory),
                expected=expected,
                load_format="dummy" if dummy else "auto",
            )
            found = verdict(result, names_in(base) | names_in(directory))
            yield "code run" if trace.exists() else found, f"{what}: {result}"
            trace.unlink(missing_ok=True)
            # What still loads may be damaged further.
            if found == "loaded" and not dummy and one.random() < 0.2:
                expected = result["tokens"]
            else:
                shutil.rmtree(directory)


def write_base(base: Path, rng: random.Random) -> None:
    """A sound checkpoint to be damaged, in half the cases with a tokenizer."""
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    write_variant(base, rng.randrange(10**9))
    if rng.random() < 0.5:
        add_tokenizer(base, fast=rng.random() >= 0.5)


def write_canary(directory: Path, trace: Path) -> None:
    """Code that leaves a trace if anything runs it."""
    (directory / "evil.py").unlink(missing_ok=True)
    code = f"open({str(trace)!r}, 'w').close()\nEvil = A = B = P = object\n"
    (directory / "evil.py").write_text(code)


def names_in(base: Path) -> set[str]:
    """What an error about a damaged copy may name: files, fields, tensors."""
    files = {path.name for path in base.rglob("*")}  # whatever they are
    fields = {*FIELD_NAMES, "architecture", "model_type"}
    return files | fields | {".safetensors", "tensor "}


def tally(verdicts: Iterator[tuple[str, str]], good: tuple[str, ...]) -> Counter[str]:
    """Counts verdicts, and prints what was not good."""
    counts: Counter[str] = Counter()
    for found, what in verdicts:
        counts[found] += 1
        if found not in good:
            print(f"{found.upper()}: {what:.1500}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", type=int, default=300, help="sound checkpoints to try")
    parser.add_argument("--mutations", type=int, default=3000, help="damaged ones to try")
    parser.add_argument("--seed", type=int, default=0, help="what both are drawn from")
    args = parser.parse_args()
    start, worker = time.monotonic(), Worker()
    try:
        sound = tally(try_variants(worker, args.variants, args.seed), ("loaded",))
        damaged = tally(try_mutations(worker, args.mutations, args.seed), ("loaded", "refused"))
    finally:
        worker.close()
    print(f"\nseed {args.seed}, {time.monotonic() - start:.0f} s")
    rows = ["loaded", "refused", "not loaded by transformers", *FAULTS]
    print(f"{'':28}{'sound':>8}{'damaged':>9}")
    for row in rows:
        print(f"{row:28}{sound[row]:>8}{damaged[row]:>9}")
    print(f"{'all':28}{sound.total():>8}{damaged.total():>9}")
    return int(sound["loaded"] < sound.total() or any(damaged[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
