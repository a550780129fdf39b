"""Measures, at start-up, what decode steps cost under each plan; the times are kept on disk.

Batch sizes are measured from the largest down, and what cannot pay is not measured:

- a size at which even a perfect overlap gains nothing over sequential decode,
- a plan that is far behind it where dense work and attention balance, such as a silly split,
- a plan that came near the fastest nowhere, or less often than others, at the size before.

What is kept on disk is the log of what was measured. A calibration is repeated from it, and made
anew if it asks for another step than the log has next.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm import tqdm

import green_ctx
import nanovllm
from nanovllm.engine.auto.cost_table import CostTable
from nanovllm.engine.auto.planner import LEAST_GAIN
from nanovllm.engine.plan import SEQUENTIAL_NUMBER, Plan
from nanovllm.utils.disk_cache import DiskCache

logger = logging.getLogger(__name__)

SIZE_STEP = 128
# Above so many sequences, every second multiple will do.
MANY = 512
# A pipeline is measured from the first to the last of these shares of the context where attention
# alone takes as long as the dense work of both micro-batches, at contexts this factor apart.
FIRST_SHARE, LAST_SHARE = 1 / 3, 2
SPACING = 1.6
# A plan that takes so many times as long as sequential decode is not measured any further,
GIVE_UP_RATIO = 1.25
# and one that is slower than the fastest by more, at every context, not at smaller sizes, where no
# more than so many plans are measured.
KEEP_RATIO = 1.04
MOST_KEPT = 3
# No time of a file is believed beyond these.
SHORTEST_STEP, LONGEST_STEP = 1e-7, 3600.0

# Seconds of a step, by the number of its plan, its sequences, and their context tokens together.
StepTimer = Callable[[int, int, int], float]


def pipelined_sizes(largest: int) -> list[int]:
    """Batch sizes that pipelines may have graphs for; halves are whole tiles of matrix products."""
    sizes = {*range(SIZE_STEP, min(largest, MANY) + 1, SIZE_STEP)}
    sizes |= {*range(MANY, largest + 1, 2 * SIZE_STEP)}
    return sorted(sizes | {largest}) if largest >= SIZE_STEP else []


def measured_sizes(largest: int) -> list[int]:
    """The sizes that are measured: the largest, and half of it again and again."""
    sizes = pipelined_sizes(largest)
    chosen = []
    while sizes:
        chosen.append(sizes[-1])
        sizes = [size for size in sizes if size <= chosen[-1] // 2]
    if chosen and chosen[-1] > SIZE_STEP:
        chosen.append(SIZE_STEP)
    return chosen


class Calibration:
    """Fills the cost `table` of one engine."""

    def __init__(
        self,
        timer: StepTimer,
        largest: int,  # batch
        capacity: int,  # tokens that the KV cache holds
        max_len: int,  # tokens of the longest sequence
        key: Mapping[str, Any],  # what the times depend on beside these; see `calibration_key`
        cache: DiskCache | None = None,  # of times; default: the user's
    ) -> None:
        self.timer = timer
        self.largest = largest
        # A few blocks more or less are no reason to measure again.
        self.capacity = capacity - capacity % (1 << max(capacity.bit_length() - 6, 0))
        self.max_len = max_len
        self.key = {**key, "largest": largest, "capacity": self.capacity, "max_len": max_len}
        self.cache = cache or DiskCache("plans")
        self.table = CostTable()

    def run(self, plans: Sequence[Plan], *, show_progress: bool) -> list[list[int]]:
        """Fills the table from the log on disk, or else by measuring; the first plan is sequential.

        Returns of each plan the sizes at which it gains something somewhere; none of sequential.
        """
        if pipelined_sizes(self.largest):
            key = self.key | {"plans": [plan.name for plan in plans]}
            log = self.cache.read(key)
            if log is None or not self._replay(log, len(plans)):
                self.cache.write(key, self._measure(plans, show_progress=show_progress))
        return [[], *(self._paying_sizes(plan) for plan in range(1, len(plans)))]

    def _measure(
        self, plans: Sequence[Plan], *, show_progress: bool
    ) -> list[tuple[int, int, int, float]]:
        """Fills the table by measuring; returns the log."""
        log = []
        with tqdm(desc="Calibrating plans", unit="step", disable=not show_progress) as bar:

            def timer(plan: int, size: int, tokens: int) -> float:
                bar.set_postfix_str(f"{plans[plan].name}, batch {size}")
                seconds = self.timer(plan, size, tokens)
                log.append((plan, size, tokens, seconds))
                bar.update()
                return seconds

            self.table = self._build_table(len(plans), timer)
        return log

    def _replay(self, log: Any, num_plans: int) -> bool:
        """Fills the table from a log that anybody may have changed; False if it does not fit."""

        def timer(*asked: int) -> float:
            *place, seconds = next(entries, [None])
            if tuple(place) != asked or type(seconds) is not float:
                raise ValueError(f"it has no time of {asked}")
            if not SHORTEST_STEP <= seconds <= LONGEST_STEP:
                raise ValueError(f"{seconds} is no time of a step")
            return seconds

        try:
            entries = iter(log)
            self.table = self._build_table(num_plans, timer)
            if list(entries):
                raise ValueError("it has times that nobody needs")
        except (TypeError, ValueError) as error:
            logger.warning("Calibration on disk is ignored: %.300r", error)
            return False
        return True

    def _build_table(self, num_plans: int, timer: StepTimer) -> CostTable:
        """A table of what is worth measuring."""
        table, timer = CostTable(), functools.cache(timer)
        plans = list(range(1, num_plans))
        for size in measured_sizes(self.largest):
            if not plans:
                break
            longest = max(1, min(self.max_len, self.capacity // size)) * size  # in all sequences
            dense = timer(SEQUENTIAL_NUMBER, size, size)
            end = timer(SEQUENTIAL_NUMBER, size, longest)
            halves = 2 * timer(SEQUENTIAL_NUMBER, size // 2, size // 2)
            counts = tokens_to_measure(size, longest, dense, end, halves)
            for tokens in sorted({size, *counts, longest}):
                table.add(SEQUENTIAL_NUMBER, size, tokens, timer(SEQUENTIAL_NUMBER, size, tokens))
            if counts:
                slowest = GIVE_UP_RATIO * table.seconds(SEQUENTIAL_NUMBER, size, counts[0])
                near = []
                for plan in plans:
                    if timer(plan, size, counts[0]) <= slowest:
                        near.append(plan)
                        for tokens in counts:
                            table.add(plan, size, tokens, timer(plan, size, tokens))
                plans = near_fastest(table, near, size, counts)
        return table

    def _paying_sizes(self, plan: int) -> list[int]:
        """The sizes at which a plan gains enough over sequential decode somewhere."""
        measured = {tokens for curve in self.table.curves(plan).values() for tokens, _ in curve}

        def gains(size: int, tokens: int) -> bool:
            sequential = self.table.seconds(SEQUENTIAL_NUMBER, size, tokens)
            return LEAST_GAIN * self.table.seconds(plan, size, tokens) <= sequential

        sizes = [size for size in pipelined_sizes(self.largest) if self.table.covers(plan, size)]
        return [size for size in sizes if any(gains(size, tokens) for tokens in measured)]


def tokens_to_measure(
    size: int, longest: int, dense: float, end: float, halves: float
) -> list[int]:
    """Tokens at which pipelines are measured, the middle one first; none where they cannot gain.

    A pipelined step takes at least as long as the dense work of both micro-batches, one after the
    other, and as attention. It gains most where the two take equally long.

    `size` and `longest` are the fewest and most tokens of the batch, `dense` and `end` the seconds
    of sequential decode at these, `halves` those of two steps of half the size at the fewest.
    """
    attention = (end - dense) / max(longest - size, 1)  # of a token
    if attention <= 0:
        return []
    balance = halves / attention
    if dense + attention * min(balance, longest) < LEAST_GAIN * halves:
        return []
    last = min(LAST_SHARE * balance, longest)
    first = min(FIRST_SHARE * balance, last)
    spread = np.geomspace(first, last, 1 + math.ceil(math.log(last / first, SPACING)))
    contexts = sorted({max(1, round(tokens / size)) for tokens in [*spread, longest]})
    contexts.insert(0, contexts.pop(len(contexts) // 2))
    return [context * size for context in contexts]


def near_fastest(
    table: CostTable, plans: Sequence[int], size: int, counts: Iterable[int]
) -> list[int]:
    """The plans to measure at smaller sizes: those that are near the fastest most often."""
    near: Counter[int] = Counter()
    for tokens in counts:
        seconds = {p: table.seconds(p, size, tokens) for p in (SEQUENTIAL_NUMBER, *plans)}
        least = min(seconds.values())
        near.update(plan for plan in plans if seconds[plan] <= KEEP_RATIO * least)
    return [plan for plan, _ in near.most_common(MOST_KEPT)]


def calibration_key(model_config: Any, device: torch.device, **more: Any) -> dict[str, Any]:
    """What measured times depend on: device, driver, versions, our code, model, and `more`."""
    import triton

    code = xxhash.xxh64()
    for source in [Path(green_ctx.__file__), *sorted(Path(nanovllm.__path__[0]).rglob("*.py"))]:
        code.update(f"{source.name}\0".encode() + source.read_bytes())
    driver = Path("/proc/driver/nvidia/version")
    return {
        "code": code.hexdigest(),
        "device": torch.cuda.get_device_name(device),
        "driver": driver.read_text() if driver.is_file() else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "model": dataclasses.asdict(model_config),
        **more,
    }
