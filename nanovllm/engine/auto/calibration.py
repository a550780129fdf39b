"""Measures, at start-up, what decode steps cost under each plan; the times are kept on disk.

Steps run on dummy inputs: sequences of one length on random keys and values. Batch sizes are
measured from the largest down, and what cannot pay is not measured:

- a size at which even a perfect overlap gains nothing over sequential decode,
- a plan that is far behind it where dense work and attention balance, such as a silly split,
- a plan that came near the fastest nowhere, or less often than others, at the size before.

The times on disk are a log of what was measured. A calibration is repeated from the log, and if
that lacks a time, or has one too many, it is made anew.
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
from nanovllm.engine.auto.planner import LEAST_GAIN, SEQUENTIAL_NUMBER
from nanovllm.engine.plan import Plan
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
Log = list[tuple[int, int, int, float]]


def pipelined_sizes(largest: int) -> list[int]:
    """Batch sizes that pipelines may have graphs for: multiples of 128 (256 above 512), `largest`.

    Their halves are whole rows of tiles of a matrix product.
    """
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
    """The cost table of one engine.

    Args:
        timer: measures a step, in seconds.
        largest: the largest batch.
        capacity: tokens that the KV cache holds.
        max_len: of the longest sequence.
        key: what the times depend on: device, versions, code, model.
        cache: where they are kept; default: the user's cache folder.

    Attributes:
        table: empty before `run`.
    """

    def __init__(
        self,
        timer: StepTimer,
        largest: int,
        capacity: int,
        max_len: int,
        key: Mapping[str, Any],
        cache: DiskCache | None = None,
    ) -> None:
        self.timer = timer
        self.largest = largest
        # A few blocks more or less are no reason to measure again.
        self.capacity = capacity - capacity % (1 << max(capacity.bit_length() - 6, 0))
        self.max_len = max_len
        self.key = {**key, "largest": largest, "capacity": self.capacity, "max_len": max_len}
        self.cache = cache or DiskCache("plans")
        self.table = CostTable()

    def longest_tokens(self, size: int) -> int:
        """The most context tokens of a batch in which all sequences are equally long."""
        return max(1, min(self.max_len, self.capacity // size)) * size

    def run(self, plans: Sequence[Plan], *, show_progress: bool) -> list[list[int]]:
        """Fills the table from the log on disk, or else by measuring.

        Args:
            plans: sequential decode is the first.
            show_progress: show a progress bar.

        Returns:
            Of each plan, the sizes at which it gains something somewhere; none of sequential.
        """
        if not pipelined_sizes(self.largest):
            return [[] for _ in plans]
        key = self.key | {"plans": [plan.name for plan in plans]}
        if not self._replay(len(plans), key):
            self.cache.write(key, self._measure_all(plans, show_progress=show_progress))
        return [[], *(self._paying_sizes(plan) for plan in range(1, len(plans)))]

    def _measure_all(self, plans: Sequence[Plan], *, show_progress: bool) -> Log:
        """Fills the table by measuring; returns what was measured."""
        log: Log = []
        with tqdm(desc="Calibrating plans", unit="step", disable=not show_progress) as bar:

            def measure(plan: int, size: int, tokens: int) -> float:
                bar.set_postfix_str(f"{plans[plan].name}, batch {size}")
                log.append((plan, size, tokens, self.timer(plan, size, tokens)))
                bar.update()
                return log[-1][-1]

            self.table = self._build_table(len(plans), measure)
        return log

    def _replay(self, num_plans: int, key: Mapping[str, Any]) -> bool:
        """Fills the table from the log on disk; returns whether there is one that fits."""
        value = self.cache.read(key)
        if value is None:
            return False
        try:
            times = read_log(value)
            self.table = self._build_table(num_plans, lambda *place: times.pop(place))
            if times:
                raise ValueError("it has times that nobody needs")
        except (ValueError, LookupError) as error:
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
            longest = self.longest_tokens(size)
            dense, end = (
                timer(SEQUENTIAL_NUMBER, size, size),
                timer(SEQUENTIAL_NUMBER, size, longest),
            )
            halves = 2 * timer(SEQUENTIAL_NUMBER, size // 2, size // 2)
            counts = tokens_to_measure(size, longest, dense, end, halves)
            for tokens in sorted({size, *counts, longest}):
                table.add(SEQUENTIAL_NUMBER, size, tokens, timer(SEQUENTIAL_NUMBER, size, tokens))
            if counts:
                plans = [plan for plan in plans if self._measure(plan, size, counts, table, timer)]
                plans = near_fastest(table, plans, size, counts)
        return table

    @staticmethod
    def _measure(
        plan: int, size: int, counts: Sequence[int], table: CostTable, timer: StepTimer
    ) -> bool:
        """Measures a pipelined plan at a size; False if it is given up after the first time."""
        first = timer(plan, size, counts[0])
        if first > GIVE_UP_RATIO * table.seconds(SEQUENTIAL_NUMBER, size, counts[0]):
            return False
        for tokens in counts:
            table.add(plan, size, tokens, timer(plan, size, tokens))
        return True

    def _paying_sizes(self, plan: int) -> list[int]:
        """The sizes at which a plan gains enough over sequential decode somewhere."""
        table = self.table
        measured = {tokens for curve in table.curves(plan).values() for tokens, _ in curve}

        def gains(size: int, tokens: int) -> bool:
            seconds = table.seconds(plan, size, tokens)
            return LEAST_GAIN * seconds <= table.seconds(SEQUENTIAL_NUMBER, size, tokens)

        return [
            size
            for size in pipelined_sizes(self.largest)
            if table.covers(plan, size) and any(gains(size, tokens) for tokens in measured)
        ]


def tokens_to_measure(
    size: int, longest: int, dense: float, end: float, halves: float
) -> list[int]:
    """Tokens at which pipelines are measured; none where they cannot gain.

    A pipelined step takes at least as long as the dense work of both micro-batches, one after the
    other, and as attention. It gains most where the two take equally long.

    Args:
        size, longest: fewest and most tokens of the batch.
        dense, end: seconds of sequential decode at these.
        halves: of two steps of half the size, at the fewest tokens.

    Returns:
        The middle one first.
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


def read_log(value: Any) -> dict[tuple[Any, ...], float]:
    """Times by plan, size and tokens, out of a file that anybody may have changed.

    Raises:
        ValueError: it is no log.
    """
    times: dict[tuple[Any, ...], float] = {}
    try:
        for *place, seconds in value:
            if type(seconds) is not float or not SHORTEST_STEP <= seconds <= LONGEST_STEP:
                raise ValueError(f"{seconds!r:.40} is no time of a step")
            if times.setdefault(tuple(place), seconds) != seconds:
                raise ValueError(f"it has two times of {place!r:.40}")
    except TypeError as error:
        raise ValueError(f"it is no log: {error}") from error
    return times


def calibration_key(model_config: Any, device: torch.device, **more: Any) -> dict[str, Any]:
    """What measured times depend on: device, driver, versions, our code, model, and `more`."""
    import triton

    driver = Path("/proc/driver/nvidia/version")
    return {
        "code": hash_sources(Path(nanovllm.__path__[0])),
        "green_ctx": xxhash.xxh64_hexdigest(Path(green_ctx.__file__).read_bytes()),
        "device": torch.cuda.get_device_name(device),
        "driver": driver.read_text() if driver.is_file() else None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "model": dataclasses.asdict(model_config),
        **more,
    }


def hash_sources(folder: Path) -> str:
    """A hash of all Python files below a folder."""
    hasher = xxhash.xxh64()
    for path in sorted(folder.rglob("*.py")):
        hasher.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()
