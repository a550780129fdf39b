"""Answers the requests of a batch file in OpenAI's format, in any order.

python -m nanovllm.batch in.jsonl out.jsonl --model Qwen/Qwen3-0.6B

A line of the input:

{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions",
 "body": {"messages": [{"role": "user", "content": "Who is Tom?"}], "max_tokens": 50}}

or with "/v1/completions" and "prompt". A line that cannot be answered gets an error in its result,
and the others go on. Start a job that has ended early once more, and it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

try:
    import numpy  # noqa: F401  torch would swallow a Ctrl-C while it imports it
    from tqdm import tqdm
    from transformers.utils.chat_template_utils import render_jinja_template

    from green_ctx import GreenContextError
    from nanovllm.batch import replicas
    from nanovllm.batch.lines import Key, Line, answer_line, error_line, read_lines, submit
    from nanovllm.batch.results import Results
    from nanovllm.config import Config, ConfigOptions
    from nanovllm.engine.llm_engine import LLMEngine
    from nanovllm.engine.outputs import RequestOutput
    from nanovllm.engine.parallel.processes import RankDiedError
    from nanovllm.engine.pipeline_modes import PipelineUnavailable
    from nanovllm.models import load_config
    from nanovllm.utils.command_line import Parser, in_one_line, number
    from nanovllm.utils.garbage import few_full_collections
    from nanovllm.utils.hub import resolve_model
    from nanovllm.utils.options import meanings
except KeyboardInterrupt:  # torch takes its time
    sys.exit(130)

PROG = "python -m nanovllm.batch"
# Of what the job asks for, or of this machine.
ERRORS = (
    ValueError, OSError, MemoryError, ImportError,
    PipelineUnavailable, GreenContextError, RankDiedError,
)  # fmt: skip


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog=PROG)
    add = parser.add_argument
    add("input", type=Path, help="file of requests")
    add("output", type=Path, help="file of results; those of an earlier run are kept")
    add("--model", required=True, help="directory or hub id")
    add("--chat-template", type=Path, metavar="FILE", help="Jinja template instead of the model's")
    add("--replicas", type=number(int), metavar="N", help="engines that share the lines, by Ray; "
        "default with --ray-address: as many as the cluster has GPUs for")  # fmt: skip
    add("--ray-address", metavar="ADDR", help="of a Ray cluster, or 'auto'; default: this machine")
    meaning = meanings(Config)
    for name in ConfigOptions.__annotations__:
        default = getattr(Config, name)
        kind: dict[str, Any] = {"type": type(default)}
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        option = f"--{name.replace('_', '-')}"
        add(option, default=default, help=f"{meaning[name]} (default: %(default)s)", **kind)
    return parser.parse_args(argv)


def read_template(path: Path) -> str:
    """The text of --chat-template; ValueError names the file if it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--chat-template {path} is no text in UTF-8: {error}") from None
    try:
        render_jinja_template([], chat_template=text)  # reads it, and renders nothing
    except Exception as error:  # of Jinja
        raise ValueError(f"--chat-template {path} is no Jinja template: {error}") from error
    return text


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    with in_one_line(PROG, *ERRORS):
        options = {name: getattr(args, name) for name in ConfigOptions.__annotations__}
        config = Config(args.model, **options)
        template = args.chat_template and read_template(args.chat_template)
        for path in (args.input, args.output):
            if path.exists() and not path.is_file():  # the input is read twice
                raise ValueError(f"{path} is not allowed: it must be a file, and no pipe or device")
        keys = find_keys(args.input)
        if args.output.exists() and args.output.samefile(args.input):
            raise ValueError(f"{args.output} is the input: name another file for the results")
        with closing(Results(args.output, keys)) as results:
            if len(results.done) < len(keys):
                run(args, config, template, results, len(keys))
        said = f"{len(keys)} results, {results.errors} of them errors"
        print(f"{args.output}: {said}", file=sys.stderr)


def run(
    args: argparse.Namespace, config: Config, template: str | None, results: Results, total: int
) -> None:
    """Answers the lines that have no result yet."""
    left = (line for line in read_lines(args.input) if line.key not in results.done)
    if args.replicas is None and args.ray_address is None:
        with LLMEngine(config) as llm, few_full_collections():
            write(answers(llm, left, template), results, total)
        return
    if args.ray_address is None:  # else the model need not be on this machine
        load_config(resolve_model(config.model))
    with replicas.cluster(args.ray_address):
        write(replicas.answers(config, list(left), template, args.replicas), results, total)


def find_keys(path: Path) -> set[Key]:
    """What identifies the requests of a file; ValueError if two have the same custom_id."""
    numbers: dict[Key, int] = {}
    for line in read_lines(path):
        first = numbers.setdefault(line.key, line.number)
        if first != line.number:
            raise ValueError(
                f"{path}: lines {first} and {line.number} have the same custom_id {line.key!r}"
            )
    return set(numbers)


def write(answers: Iterable[list[dict[str, Any]]], results: Results, total: int) -> None:
    """Writes the results of lines as they come."""
    tokens, start = 0, time.perf_counter()
    with tqdm(total=total, initial=len(results.done), desc="Batch", unit="line") as bar:
        for answered in answers:
            results.append(answered)
            for result in answered:
                if result["response"]:
                    tokens += result["response"]["body"]["usage"]["completion_tokens"]
            rate = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(answered))


def answers(
    llm: LLMEngine, lines: Iterator[Line], chat_template: str | None
) -> Iterator[list[dict[str, Any]]]:
    """The results of all lines, after each step those of the requests that have ended."""
    running: dict[int, tuple[Line, range, list[RequestOutput]]] = {}
    # Enough for the scheduler always to have one waiting; the rest stays in the file.
    most = 2 * llm.config.max_num_seqs
    while True:
        answered: list[dict[str, Any]] = []
        while len(running) + len(answered) < most and (line := next(lines, None)) is not None:
            try:
                ids = submit(llm, line, chat_template)
                running |= dict.fromkeys(ids, (line, ids, []))
            except (TypeError, ValueError) as error:
                answered.append(error_line(line, error))
        if not running and not answered:
            return
        if running:
            for output in llm.step():
                line, ids, ended = running.pop(output["request_id"])
                ended.append(output)
                if len(ended) == len(ids):
                    answered.append(answer_line(line, ended, llm.config.model))
        yield answered


if __name__ == "__main__":
    main()
