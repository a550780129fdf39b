"""A tensor-parallel worker: `python -m nanovllm.engine.worker`, started by rank 0 alone.

Its task comes as one line of JSON on standard input; the end of that input means that rank 0 is
gone, and with it the reason to live.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

import torch

from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.ranks import Ranks, WorkerTask


def main() -> None:
    task = WorkerTask(**json.loads(sys.stdin.buffer.readline()))
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    device = torch.device("cuda", task.rank) if task.device_type == "cuda" else torch.device("cpu")
    config = Config(**task.config)
    with ModelRunner(config, Path(task.model_dir), device, Ranks.join(task)) as runner:
        runner.serve()


def _end_with_rank_0() -> None:
    sys.stdin.buffer.read()
    # NOTE: not sys.exit: the main thread may be inside a collective that will never return.
    os._exit(1)


if __name__ == "__main__":
    main()
