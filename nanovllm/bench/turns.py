"""Arms in turn: decode steps at a given batch and context, without the prefill before them.

In a turn of an arm, N requests whose prompts count as computed run `output` decode steps, from
scheduling to the tokens on the host; every turn begins at the same context again. Each has KV
blocks of its own, which hold random numbers.

A round gives each arm one turn, so that a device that gets warmer or slower does so under all arms
alike. Every second round is the one before it backwards, in which a steady drift cancels. An arm
also finds the clocks that the one before it has left behind, so the order changes, and there are as
many rounds as it takes until every arm has followed every other equally often: a block of rounds.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from nanovllm.bench import DoesNotFit
from nanovllm.bench.arms import Arm, Specs, open_arms, pipeline_options
from nanovllm.bench.engines import fill_cache, kv_blocks, room, start_engine
from nanovllm.bench.report import Record
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams

T = TypeVar("T")

# Steps at each end of a turn that do not count: there the engine starts up or runs dry.
EDGE_STEPS = 2
SHORTEST_OUTPUT = 2 * EDGE_STEPS + 1
WARM_UP_ROUNDS = 2
FEWEST_ROUNDS = 4


class Turn(NamedTuple):
    """A turn that was run."""

    arm: Arm
    seconds: list[float]  # of each of its steps, without the edges
    end: float  # by `time.time`


@dataclass(frozen=True)
class DecodeWorkload:
    """Turns of `output` decode steps of `batch` sequences that begin with `context` tokens."""

    batch: int
    context: int
    output: int  # at least `SHORTEST_OUTPUT`

    @property
    def mean_context(self) -> float:
        """Tokens a sequence that a step reads, on the average of a turn."""
        return self.context + (self.output + 1) / 2

    @property
    def max_len(self) -> int:
        """Tokens of a sequence at the end of a turn; the last of them is never read."""
        return self.context + self.output + 1

    def blocks(self, block_size: int) -> int:
        """KV blocks that a turn needs."""
        return kv_blocks(self.batch, self.max_len, block_size)

    def check_fits(self, engine: LLMEngine) -> None:
        """Raises DoesNotFit if the engine has no room for all sequences at a time."""
        runner = engine.model_runner
        needed = self.blocks(runner.block_size)
        if self.max_len > runner.max_model_len or needed > runner.num_blocks:
            raise DoesNotFit(
                f"{self.batch} sequences of up to {self.max_len} tokens do not fit: they need "
                f"{needed} KV blocks of {runner.block_size} tokens, and there is memory for "
                f"{runner.num_blocks}; no sequence can have more than {runner.max_model_len}"
            )


@contextmanager
def start_arms(
    args: argparse.Namespace,
    specs: Specs,
    largest: DecodeWorkload,
    must_fit: bool = True,
    **options: Any,
) -> Iterator[tuple[LLMEngine, list[Arm], Record]]:
    """An engine with room for a workload, its arms, and its record; the cache is random numbers.

    `options` are further fields of `Config`. Raises DoesNotFit if `must_fit` and it does not.
    """
    options = room(args, largest.batch, largest.max_len) | options
    if args.tensor_parallel_size > 1:
        for mode, split in specs.values():
            options |= pipeline_options(mode, split)
    longest = largest.max_len if must_fit else 0
    with start_engine(args, longest=longest, **options) as (engine, about):
        if must_fit:
            largest.check_fits(engine)
        fill_cache(engine)
        with open_arms(engine, specs) as arms:
            yield engine, arms, about


def run_turn(engine: LLMEngine, workload: DecodeWorkload) -> list[float]:
    """Runs one turn; returns the wall time of each of its steps in seconds, without the edges."""
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=workload.output)
    vocab_size = engine.model_runner.model_config.vocab_size
    # Only the last token is read; the cache holds random numbers for the others.
    for last in np.random.default_rng(0).integers(0, vocab_size, workload.batch).tolist():
        engine.add_computed_request([0] * workload.context + [last], params)
    moments = [time.perf_counter()]
    while not engine.is_finished():
        engine.step()
        moments.append(time.perf_counter())
    return np.diff(moments)[EDGE_STEPS:-EDGE_STEPS].tolist()


def run_turns(
    engine: LLMEngine, arms: Sequence[Arm], workload: DecodeWorkload, rounds: int
) -> Iterator[Turn]:
    """In each round, a turn of every arm."""
    for number in range(rounds):
        for arm in in_order(arms, number):
            arm.activate()
            yield Turn(arm, run_turn(engine, workload), time.time())


def measure(
    engine: LLMEngine, arms: Sequence[Arm], workload: DecodeWorkload, seconds: float
) -> Iterator[list[Turn]]:
    """All turns so far, after each round, until each arm ran for `seconds`.

    None of the arms may fall back.
    """
    warm_up = run_turns(engine, arms, workload, WARM_UP_ROUNDS)
    count = WARM_UP_ROUNDS * len(arms)
    warm_up = tqdm(warm_up, "Warming up", count, unit="turn", leave=False)
    last = {turn.arm.label: sum(turn.seconds) for turn in warm_up}
    rounds = count_rounds(seconds, min(last.values()), len(arms))
    turns = run_turns(engine, arms, workload, rounds)
    so_far: list[Turn] = []
    for turn in tqdm(turns, "Measuring", rounds * len(arms), unit="turn", leave=False):
        so_far.append(turn)
        if len(so_far) % len(arms) == 0:
            yield so_far


def step_times(turns: Iterable[Turn]) -> dict[str, Record]:
    """Of the steps of each arm, by label: how many, and the quartiles of their wall time in ms."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in turns:
        seconds[turn.arm.label] += turn.seconds
    times = {}
    for label, of in seconds.items():
        q1, middle, q3 = (np.percentile(of, [25, 50, 75]) * 1e3).tolist()
        times[label] = {"steps": len(of), "step_ms": {"median": middle, "q1": q1, "q3": q3}}
    return times


def count_rounds(seconds: float, turn_seconds: float, num_arms: int) -> int:
    """Rounds in which turns of at least `turn_seconds` fill `seconds`: whole blocks, not few.

    A block, after which all is balanced, is an even number of rounds and a multiple of the arms.
    """
    block = math.lcm(2, num_arms)
    return block * math.ceil(max(FEWEST_ROUNDS, seconds / turn_seconds) / block)


def in_order(arms: Sequence[T], number: int) -> Sequence[T]:
    """The arms as that round takes them: of five, abecd, dceba, bcade, edacb, and so on.

    Source: E. J. Williams, "Experimental designs balanced for the estimation of residual effects of
    treatments", 1949: a zigzag through the arms and its shifts.
    """
    count = len(arms)
    zigzag = [(place + 1) // 2 if place % 2 else -place // 2 for place in range(count)]
    order = [arms[(step + number // 2) % count] for step in zigzag]
    return order[:: -1 if number % 2 else 1]
