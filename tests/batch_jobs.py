"""Batch files for tests, and a job that is killed until it ends.

python tests/batch_jobs.py --lines 10000 --kills 20
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm.batch.__main__ import main
from nanovllm.tiny import CHECKPOINT_DIR, PROMPTS

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def request(custom_id: object, **body: Any) -> dict[str, Any]:
    """A request for a completion, or with `messages`, for a chat."""
    url = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def stories(count: int, tokens: int = 8) -> list[dict[str, Any]]:
    """Requests of up to `tokens` tokens, every tenth of which is refused."""
    requests = [
        request(f"story-{i}", prompt=PROMPTS[i % len(PROMPTS)], max_tokens=1 + i % tokens, seed=i)
        for i in range(count)
    ]
    for each in requests[5::10]:
        each["body"]["temperature"] = -1
    return requests


def write(path: Path, lines: Iterable[object]) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def arguments(source: Path, output: Path, *more: object) -> list[str]:
    paths = [source, output, "--model", CHECKPOINT_DIR, "--device", "cpu"]
    return [str(each) for each in [*paths, *more]]


def run_quietly(argv: list[str]) -> None:
    """A process of its own: `main`, without its progress bar."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    main(argv)


def run_and_kill(source: Path, output: Path, kills: int, within: float, *more: object) -> int:
    """Runs a job until it ends, and kills it soon after its first new result, at most so often.

    The moment is random, `within` seconds. Returns how often it was killed.
    """
    output.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers.models.auto", "tests.batch_jobs"])
    killed = 0
    while True:
        done = output.stat().st_size
        process = context.Process(target=run_quietly, args=(arguments(source, output, *more),))
        process.start()
        while killed < kills and process.is_alive() and output.stat().st_size <= done:
            time.sleep(0.002)
        process.join(random.random() * within if killed < kills else None)
        if not process.is_alive():
            assert process.exitcode == 0, process.exitcode
            return killed
        process.kill()
        process.join()
        killed += 1


def check_stories(results: list[dict[str, Any]], count: int) -> None:
    """All are there, each once, and those are refused that must be."""
    numbers = [int(result["custom_id"].removeprefix("story-")) for result in results]
    assert sorted(numbers) == list(range(count))
    for number, result in zip(numbers, results, strict=True):
        assert (result["error"] is None) == (number % 10 != 5)


def kill_a_long_job() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        source = write(Path(directory) / "in.jsonl", stories(options.lines))
        output = Path(directory) / "out.jsonl"
        killed = run_and_kill(source, output, options.kills, 3.0)
        check_stories(read(output), options.lines)
    seconds = time.monotonic() - begin
    print(f"killed {killed} times: {options.lines:,} results, each once, in {seconds:.0f} s")


if __name__ == "__main__":
    kill_a_long_job()
