"""Breaks off an engine at a line of its own code: what Ctrl-C, a signal handler or an error may do.

    python tests/interrupts.py --count 600           # interrupts at random lines
    python tests/interrupts.py --steps 2             # an error at every line of two steps

A scenario of requests that come, run, are aborted and finish is played once to count the lines
that it executes in nanovllm/, and then again and again with an exception at one of them. After it
the engine must give the right tokens, or say that it has closed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

if __name__ == "__main__":  # the repository's packages, wherever the script is started
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nanovllm
from nanovllm import LLM, SamplingParams
from tests.checkpoints import VOCAB, Shape
from tests.small_tokenizers import byte_level, fill, write

PACKAGE = str(Path(nanovllm.__file__).parent)
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "max_model_len": 64,
    "kvcache_block_size": 16,
    "num_kvcache_blocks": 5,  # so few that requests are preempted
    "max_num_batched_tokens": 24,
    "max_num_seqs": 3,
}
PROMPTS = [random.Random(n).choices(range(2, VOCAB), k=n) for n in (28, 30, 5, 12, 29, 3)]
# Every other one needs its tokens on the device.
PLAIN = [
    SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, frequency_penalty=i % 2)
    for i, n in enumerate((8, 9, 6, 1, 7, 7))
]
# Two end with a stop text that is divided among tokens, one looks for one in vain.
STOPS = {0: ["dßa"], 2: ["nowhere"], 4: [" h\x0boi"]}
PARAMS = [replace(params, stop=STOPS.get(i)) for i, params in enumerate(PLAIN)]
# An error at its lines is the tokenizer's, and ends the request.
TOKENIZER = "_decode"


class Interrupt(KeyboardInterrupt):
    """No `except Exception` of the engine's may take it for an error of its own."""


class InterruptAt:
    """Within `with`, raises `error` before line number `line` of the files below `paths`.

    `executed` counts the lines; line 0 is never met.
    """

    def __init__(
        self,
        line: int,
        paths: Iterable[str] = (PACKAGE,),
        error: type[BaseException] = Interrupt,
    ) -> None:
        self.line, self.paths, self.error = line, tuple(paths), error
        self.executed = 0

    @property
    def reached(self) -> bool:
        return self.executed >= self.line

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(self.paths):
            return None
        if code.co_name == TOKENIZER and issubclass(self.error, Exception):
            return None
        if event == "line":
            self.executed += 1
            if self.executed == self.line:
                raise self.error(f"{code.co_filename}:{frame.f_lineno}")
        return self

    def __enter__(self) -> InterruptAt:
        self.before = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self.before)


@dataclass
class Play:
    """Requests that are added, stepped, aborted and generated, on an engine."""

    engine: LLM
    ids: dict[int, int] = field(default_factory=dict)  # request id -> number of the prompt
    said: dict[int, list[int]] = field(default_factory=dict)  # number of the prompt -> tokens

    def run(self) -> dict[int, list[int]]:
        engine = self.engine
        for i in range(3):
            self.ids[engine.add_request(PROMPTS[i], PARAMS[i])] = i
        dropped = engine.add_request(PROMPTS[3], PARAMS[5])
        for _ in range(2):
            self.step()
        engine.abort(dropped)
        outputs = engine.generate(PROMPTS[3:5], PARAMS[3:5], use_tqdm=False)
        self.said |= {3 + i: output["token_ids"] for i, output in enumerate(outputs)}
        self.said[5] = []
        for delta in engine.stream(PROMPTS[5:], PARAMS[5:], deltas=True):
            self.said[5] += delta["token_ids"]
        self.finish()
        return self.said

    def step(self) -> None:
        for output in self.engine.step():
            # One that `run` does not know was added by a call that was broken off.
            if output["request_id"] in self.ids:
                self.said[self.ids[output["request_id"]]] = output["token_ids"]

    def finish(self) -> None:
        for _ in range(300):
            if self.engine.is_finished():
                return
            self.step()
        raise AssertionError("requests are left that never finish")


@dataclass
class CountedPlay(Play):
    """A play that notes which lines each step executes."""

    lines: InterruptAt = field(default_factory=lambda: InterruptAt(0))
    steps: list[range] = field(default_factory=list)

    def step(self) -> None:
        first = self.lines.executed + 1
        super().step()
        self.steps.append(range(first, self.lines.executed + 1))


def verdict(play: Play, right: dict[int, list[int]]) -> str:
    """What became of the engine of a broken-off play: "right", "closed" or "wrong: ..."."""
    engine = play.engine
    try:
        play.finish()
        if any(play.said.get(i) != right[i] for i in play.ids.values()):
            return f"wrong: {play.said} of {play.ids}"
        if Play(engine).run() != right:
            return "wrong: tokens afterwards"
    except RuntimeError as error:
        return "closed" if "exited" in str(error) else f"wrong: {error!r}"
    except Exception as error:
        return f"wrong: {error!r}"
    blocks = engine.scheduler.blocks
    idle = engine.scheduler.is_idle and len(blocks.free) == blocks.num_blocks
    return "right" if idle and not engine.requests else "wrong: something is left behind"


class Victim:
    """An engine that is broken off again and again, and made anew if it does not survive."""

    def __init__(self, directory: str, error: type[BaseException] = Interrupt) -> None:
        self.directory, self.error = directory, error
        self.engine = LLM(directory, **OPTIONS)
        self.right = Play(self.engine).run()
        with InterruptAt(0) as lines:
            play = CountedPlay(self.engine, lines=lines)
            play.run()
        self.lines, self.steps = lines.executed, play.steps

    def break_off(self, line: int) -> str | None:
        """A play that is broken off at that line; None if it ended before."""
        play = Play(self.engine)
        try:
            with InterruptAt(line, error=self.error):
                play.run()
            return None
        except self.error:
            result = verdict(play, self.right)
        if result != "right":
            self.engine.exit()
            self.engine = LLM(self.directory, **OPTIONS)
        return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=600, help="interrupts at random lines")
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="instead: an error at every line of the first N steps",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # small models only wait for their threads
    results: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        victim = Victim(directory, RuntimeError if args.steps else Interrupt)
        draw = random.Random(args.seed)
        if args.steps:
            chosen = [line for step in victim.steps[: args.steps] for line in step]
        else:
            chosen = [draw.randrange(1, victim.lines) for _ in range(args.count)]
        for line in chosen:
            result = victim.break_off(line) or "not reached"
            results[result.split(":")[0]] += 1
            if result != "right":
                print(f"line {line}: {result}", flush=True)
        victim.engine.exit()
    print(f"broken off {len(chosen)} times, at {victim.lines} lines of a play: {dict(results)}")
    return int(results["wrong"] > 0)


def write_model(directory: Path) -> None:
    Shape(layers=1, heads=2, kv_heads=1, hidden=32, seed=5).write(directory)
    write(byte_level(fill(VOCAB)), directory)


if __name__ == "__main__":
    sys.exit(main())
