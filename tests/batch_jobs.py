"""Batch files for tests, and what must be true of the results."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

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
