"""Threads that generate, step and abort at a time on one engine, round after round.

    python tests/thread_rounds.py --rounds 100

Blocks are scarce in every other round, so that requests of one thread preempt those of another.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

if __name__ == "__main__":  # the repository's packages, wherever the script is started
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nanovllm import LLM
from tests.checkpoints import Shape
from tests.engine.cases import GREEDY, OPTIONS, PROMPTS, check_empty, drain, tokens

# One step at a time, a thread among eight waits for seven others; a hang is far above this.
PATIENCE = 200


def run_all(*tasks) -> None:
    """Runs each task in a thread of its own, all at a time; raises what one of them raises."""
    errors: list[BaseException] = []

    def guarded(task) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(t,), daemon=True) for t in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


class Round:
    """Threads that generate, step and abort at a time, all of them checked."""

    def __init__(self, engine: LLM, expected: list[list[int]], draw: random.Random) -> None:
        self.engine, self.expected = engine, expected
        self.added: dict[int, int] = {}  # request id -> number of its prompt
        self.said: dict[int, list[int]] = {}
        kinds = [self.generate, self.generate, self.step, self.abort]
        self.tasks = [self.task(draw.choice(kinds), draw) for _ in range(draw.randint(2, 8))]

    def task(self, kind, draw: random.Random):
        numbers = draw.choices(range(len(PROMPTS)), k=draw.randint(1, 4))
        return lambda: kind(numbers)

    def run(self) -> None:
        run_all(*self.tasks)
        self.said |= drain(self.engine)
        assert {i: self.said[i] for i in self.added} == {
            i: self.expected[number] for i, number in self.added.items()
        }
        check_empty(self.engine)

    def generate(self, numbers: list[int]) -> None:
        outputs = self.engine.generate([PROMPTS[i] for i in numbers], GREEDY, use_tqdm=False)
        assert tokens(outputs) == [self.expected[i] for i in numbers]

    def step(self, numbers: list[int]) -> None:
        mine = [self.engine.add_request(PROMPTS[i], GREEDY) for i in numbers]
        self.added |= dict(zip(mine, numbers, strict=True))
        while not self.said.keys() >= set(mine):
            self.said.update((out["request_id"], out["token_ids"]) for out in self.engine.step())

    def abort(self, numbers: list[int]) -> None:
        for i in numbers:
            request = self.engine.add_request(PROMPTS[i], GREEDY)
            time.sleep(0.001 * i)
            self.engine.abort(request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # small models only wait for their threads
    draw, threads, preemptions = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as directory:
        Shape(seed=5).write(Path(directory))
        scarce = {**OPTIONS, "num_kvcache_blocks": 5, "max_num_seqs": 6}
        with LLM(directory, **OPTIONS) as roomy, LLM(directory, **scarce) as tight:
            expected = tokens(roomy.generate(PROMPTS, GREEDY, use_tqdm=False))
            for number in range(args.rounds):
                turn = Round((roomy, tight)[number % 2], expected, draw)
                turn.run()
                threads += len(turn.tasks)
            preemptions = tight.scheduler.num_preemptions
    print(f"{args.rounds} rounds, {threads} threads, {preemptions} preemptions: all right")


if __name__ == "__main__":
    main()
