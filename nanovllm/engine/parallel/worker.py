"""A tensor-parallel worker: `python -m nanovllm.engine.parallel.worker`, started by rank 0 alone.

It is a program of its own, not a multiprocessing child, so that a user's script needs no
`if __name__ == "__main__"`. See processes.py for its standard input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path

import torch

from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.parallel.processes import WorkerTask, end_with
from nanovllm.engine.parallel.ranks import Ranks


def main() -> None:
    line = sys.stdin.buffer.readline()
    if not line:
        return  # rank 0 has gone already
    task = WorkerTask(**json.loads(line))
    threading.Thread(target=end_with, args=(task.parent,), daemon=True).start()
    try:
        _serve(task)
    except BaseException:
        print(f"rank {task.rank} of {task.size}: {traceback.format_exc()}", file=sys.stderr)
        sys.stderr.flush()
        # NOTE: no ordinary exit: it could wait on a collective whose other ranks wait for this one.
        os._exit(1)


def _serve(task: WorkerTask) -> None:
    torch.set_num_threads(task.num_threads)
    config, device = Config(**task.config), torch.device(task.device)
    runner = ModelRunner(config, Path(task.model_dir), device, Ranks.join(task, config))
    runner.serve()
    runner.close()  # only then: after an error it would wait for the other ranks


if __name__ == "__main__":
    main()
