"""Arms in turn: decode steps at a given batch and context, without the prefill before them.

    workload = DecodeWorkload(batch=256, context=1024, output=64)
    for times in measure(engine, arms, workload, seconds=2.0):
        times["green"]["step_ms"]["median"]

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from nanovllm.bench import BenchError, DoesNotFit
from nanovllm.bench.arms import Arm, ArmSpec, open_arms, rank_options
from nanovllm.bench.engines import fill_cache, kv_blocks, room, start_engine
from nanovllm.bench.report import Record
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams

T = TypeVar("T")

# Steps at each end of a turn that do not count: there the engine starts up or runs dry.
EDGE_STEPS = 2
SHORTEST_OUTPUT = 2 * EDGE_STEPS + 1
WARM_UP_TURNS = 2
FEWEST_ROUNDS = 4

# The label of an arm, and the times of its steps in one turn, in seconds.
Turn = tuple[str, list[float]]
# See `step_times`.
Times = dict[str, Any]


@dataclass(frozen=True)
class DecodeWorkload:
    """Turns of `output` decode steps of `batch` sequences that begin with `context` tokens."""

    batch: int
    context: int
    output: int

    def __post_init__(self) -> None:
        if self.output < SHORTEST_OUTPUT:
            raise BenchError(
                f"output={self.output} is not allowed: it must be at least {SHORTEST_OUTPUT}, as "
                f"the first and the last {EDGE_STEPS} steps of a turn do not count"
            )

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
        if self.max_len > runner.max_model_len:
            raise DoesNotFit(
                f"context={self.context} and output={self.output} are not allowed: together they "
                f"must be below the longest sequence, {runner.max_model_len} tokens"
            )
        needed = self.blocks(runner.block_size)
        if self.batch > engine.config.max_num_seqs or needed > runner.num_blocks:
            raise DoesNotFit(
                f"batch={self.batch} at context={self.context} does not fit: it needs {needed} KV "
                f"blocks of {runner.block_size} tokens, and there is memory for "
                f"{runner.num_blocks}"
            )


@contextmanager
def start_arms(
    args: argparse.Namespace,
    specs: Sequence[ArmSpec],
    largest: DecodeWorkload,
    must_fit: bool = True,
    **options: Any,
) -> Iterator[tuple[LLMEngine, list[Arm], Record]]:
    """An engine with room for a workload, its arms, and its record; the cache is random numbers.

    `options` are those of `start_engine`. Raises DoesNotFit if `must_fit` and it does not.
    """
    options = room(args, largest.batch, largest.max_len) | options
    options |= rank_options(specs, args.tensor_parallel_size)
    longest = largest.max_len if must_fit else 0
    with start_engine(args, longest=longest, **options) as (engine, about):
        if must_fit:
            largest.check_fits(engine)
        fill_cache(engine)
        with open_arms(engine, specs) as arms:
            yield engine, arms, about


def step_times(seconds: Sequence[float]) -> dict[str, Any]:
    """The record of an arm's steps: how many, and quartiles of their wall time in ms."""
    q1, middle, q3 = (np.percentile(seconds, [25, 50, 75]) * 1e3).tolist()
    return {"steps": len(seconds), "step_ms": {"median": middle, "q1": q1, "q3": q3}}


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
    """The arms in turn, each of them once a round."""
    for number in range(rounds):
        for arm in in_order(arms, number):
            arm.activate()
            yield arm.label, run_turn(engine, workload)


def measure(
    engine: LLMEngine,
    arms: Sequence[Arm],
    workload: DecodeWorkload,
    seconds: float,
    watch: Callable[[Iterator[Turn]], Iterator[Turn]] = iter,
) -> Iterator[dict[str, Times]]:
    """Step times so far by label, after each block of rounds, until each arm ran for `seconds`.

    None of the arms may fall back. `watch` is given the turns and hands them on.
    """
    turns = run_turns(engine, arms, workload, WARM_UP_TURNS)
    total = WARM_UP_TURNS * len(arms)
    # Of each arm, the last turn.
    lengths = {label: sum(times) for label, times in tqdm(turns, "Warming up", total, unit="turn")}
    rounds = count_rounds(seconds, min(lengths.values()), len(arms))
    turns = watch(run_turns(engine, arms, workload, rounds))
    turns = iter(tqdm(turns, "Measuring", rounds * len(arms), unit="turn"))
    yield from gather(turns, rounds_of_block(len(arms)) * len(arms))


def gather(turns: Iterator[Turn], block: int) -> Iterator[dict[str, Times]]:
    """Step times by label over all turns so far, whenever another `block` of them is complete."""
    seconds: dict[str, list[float]] = defaultdict(list)
    while part := list(islice(turns, block)):
        for label, times in part:
            seconds[label] += times
        yield {label: step_times(times) for label, times in seconds.items()}


def rounds_of_block(num_arms: int) -> int:
    """Rounds until all is balanced: an even number, and a multiple of the arms, twice if odd."""
    return math.lcm(2, num_arms if num_arms % 2 == 0 else 2 * num_arms)


def count_rounds(seconds: float, turn_seconds: float, num_arms: int) -> int:
    """Rounds in which turns of at least `turn_seconds` fill `seconds`: whole blocks, not few."""
    block = rounds_of_block(num_arms)
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


def timed_arms(arms: Iterable[Arm], batch: int) -> list[Arm]:
    """Those that run steps of `batch` sequences as asked for."""
    return [arm for arm in arms if arm.fallback_reason(batch) is None]
