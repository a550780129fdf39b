"""Engines with their requests, in this process or in others, and what comes of them."""

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanovllm import LLM, SamplingParams
from tests import scripts


def run(
    options: dict[str, Any], prompts: list[list[int]], sampling: list[dict[str, Any]]
) -> dict[str, Any]:
    """A task: `options` of `LLM`, prompts, and the fields of each one's `SamplingParams`."""
    with LLM(**options) as llm:
        params = [SamplingParams(**fields) for fields in sampling]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        runner = llm.model_runner
        return {
            "outputs": outputs,
            "preemptions": llm.scheduler.num_preemptions,
            "pipelined": runner.statistics.steps["pipelined"],
            "shares_memory": runner.ranks.group.peers is not None,
        }


def run_elsewhere(directory: Path, tasks: list[dict], processes: int = 0) -> list[dict[str, Any]]:
    """The same of several tasks in one process, or in so many under torchrun."""
    file = directory / "tasks.json"
    file.write_text(json.dumps(tasks))
    timeout = 180 + 60 * len(tasks)
    lines = scripts.output_of(__file__, file, processes=processes, timeout=timeout)
    return [json.loads(line) for line in lines]


if __name__ == "__main__":
    for task in json.loads(Path(sys.argv[1]).read_text()):
        with suppress(SystemExit):  # under torchrun; ranks but the first serve within `LLM`
            print(json.dumps(run(**task)), flush=True)
