"""Measures, at start-up, what decode steps cost under each plan; the times are kept on disk.

Steps run on made-up inputs: sequences of one length, whose keys and values are whatever random
numbers the cache was filled with. Sequential decode is measured first, at a few batch sizes. From
that, `gain_bound` says how much a pipeline could gain at best; only where that is something are
pipelines captured and measured, the largest batch first. Of the splits only those go on to the
smaller batches that came near the best one there. Batch sizes between are interpolated.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from tqdm import tqdm

from nanovllm import kernels
from nanovllm.engine.cost_table import CostTable, Curve, Sample, gain_bound, next_sample
from nanovllm.engine.plan import Plan
from nanovllm.utils.disk_cache import DiskCache

logger = logging.getLogger(__name__)

SIZE_STEP = 128
# Above so many sequences, every second multiple will do.
MANY = 512
# No less is worth a pipeline's graphs.
LEAST_GAIN = 1.02
# A split that is slower than the best one by more, at every context, is given up.
NEAR_BEST = 1.04
SAMPLES = 5
# A split that takes so many times as long as sequential decode at both ends of the context is not
# looked at in between. The default counts of `Config` leave most of a large GPU idle.
HOPELESS = 1.5

# Seconds of a step, by the number of its plan, its sequences, and their context tokens together.
StepTimer = Callable[[int, int, int], float]


def pipelined_sizes(largest: int) -> list[int]:
    """Batch sizes that pipelines have graphs for: multiples of 128 (256 above 512), and `largest`.

    Their halves are whole rows of tiles of a matrix product.
    """
    sizes = {*range(SIZE_STEP, min(largest, MANY) + 1, SIZE_STEP)}
    sizes |= {*range(MANY, largest + 1, 2 * SIZE_STEP)}
    return sorted(sizes | {largest}) if largest >= SIZE_STEP else []


def measured_sizes(largest: int) -> list[int]:
    """Those of them that are measured: the largest, and half of it again and again."""
    sizes = pipelined_sizes(largest)
    chosen = []
    while sizes:
        chosen.append(sizes[-1])
        sizes = [size for size in sizes if size <= chosen[-1] // 2]
    if chosen and chosen[-1] > SIZE_STEP:
        chosen.append(SIZE_STEP)
    return chosen


def with_halves(sizes: Sequence[int]) -> list[int]:
    """The sizes, and the halves of them that are not among them: those of their micro-batches."""
    return [*sizes, *(size // 2 for size in sizes if size // 2 not in sizes)]


class Calibration:
    """The cost table of one engine.

    Args:
        timer: measures a step.
        largest: the largest batch.
        capacity: tokens that the KV cache holds.
        max_len: of the longest sequence.
        weight_tokens: context tokens whose KV cache is as large as the weights.
        key: what the times depend on: device, versions, model.
        cache: where they are kept; default: the user's cache folder.
    """

    def __init__(
        self,
        timer: StepTimer,
        largest: int,
        capacity: int,
        max_len: int,
        weight_tokens: float,
        key: Mapping[str, Any],
        cache: DiskCache | None = None,
    ) -> None:
        self.timer = timer
        self.largest = largest
        self.capacity = capacity
        self.max_len = max_len
        self.weight_tokens = weight_tokens
        self.key = dict(key) | {"largest": largest, "longest": self.longest_tokens(largest)}
        self.cache = DiskCache("plans") if cache is None else cache
        self.table = CostTable()

    def longest_tokens(self, batch: int) -> int:
        """The most context tokens that `batch` sequences can have."""
        return min(self.capacity, batch * self.max_len)

    def run(self, plans: Sequence[Plan], *, show_progress: bool) -> dict[Plan, list[int]]:
        """Fills the table, from disk or by measuring.

        Args:
            plans: those of the engine; the first is sequential.
            show_progress: whether to show a progress bar.

        Returns:
            Of every plan but the first, the batch sizes at which it can be worth its graphs.
        """
        if not pipelined_sizes(self.largest):
            return {}
        key = self.key | {"plans": [plan.name for plan in plans]}
        self.table = CostTable.load(self.cache, key)
        sequential = plans[0]
        if not self._is_filled([plan.name for plan in plans]):
            if self.table.plans:
                logger.warning("Cost table on disk is ignored: it is not one of these batch sizes")
            self.table = CostTable()
            with tqdm(desc="Calibrating plans", unit="step", disable=not show_progress) as bar:
                self._measure(plans, bar)
            self.table.save(self.cache, key)
        worthwhile = self._worthwhile(sequential)
        return {
            plan: [size for size in worthwhile if self.table.curve(plan.name, size) is not None]
            for plan in plans[1:]
        }

    def _is_filled(self, plans: Sequence[str]) -> bool:
        """Whether `_measure` may have filled the table, which anybody may have put on disk."""
        sizes = measured_sizes(self.largest)
        allowed = dict.fromkeys(plans, sizes) | {plans[0]: with_halves(sizes)}
        if self.table.batches(plans[0]) != sorted(allowed[plans[0]]):
            return False
        return all(
            size in allowed.get(plan, ()) and self._may_be_of(size, self.table.curve(plan, size))
            for plan in self.table.plans
            for size in self.table.batches(plan)
        )

    def _may_be_of(self, size: int, curve: Curve | None) -> bool:
        """Whether `next_sample` may have asked for these samples at that batch size."""
        longest = max(self.longest_tokens(size), size)
        return curve is not None and all(
            size <= tokens <= longest and tokens % size == 0 for tokens in curve.tokens
        )

    def _measure(self, plans: Sequence[Plan], bar: Any) -> None:
        sequential, *pipelines = plans
        numbers = {plan: number for number, plan in enumerate(plans)}
        sizes = measured_sizes(self.largest)
        for size in with_halves(sizes):
            self._measure_curve(sequential, 0, size, bar)
        worthwhile = self._worthwhile(sequential)
        for size in sizes:
            if size not in worthwhile:
                continue
            beside = self.table.curve(sequential.name, size)
            for plan in pipelines:
                self._measure_curve(plan, numbers[plan], size, bar, beside)
            pipelines = self._near_best(pipelines, size)

    def _measure_curve(
        self, plan: Plan, number: int, size: int, bar: Any, beside: Curve | None = None
    ) -> None:
        """Adds the plan's curve to the table, unless it is hopeless beside that other curve."""
        bar.set_postfix_str(f"{plan.name}, batch {size}")
        samples: list[Sample] = []
        longest = self.longest_tokens(size)
        while (tokens := next_sample(samples, size, longest, most=SAMPLES)) is not None:
            samples.append((tokens, self.timer(number, size, tokens)))
            bar.update()
            if len(samples) == 2 and beside is not None and is_hopeless(samples, beside):
                return
        self.table.add(plan.name, size, samples)

    def _worthwhile(self, sequential: Plan) -> list[int]:
        """The sizes at which a pipeline might gain something."""
        sizes = []
        for size in pipelined_sizes(self.largest):
            whole = self.table.curve(sequential.name, size)
            half = self.table.curve(sequential.name, size // 2)
            longest = self.longest_tokens(size)
            if whole is None or half is None:
                continue
            bound = gain_bound(whole, half, longest, weight_tokens=self.weight_tokens)
            if bound >= LEAST_GAIN:
                sizes.append(size)
        return sizes

    def _near_best(self, plans: Sequence[Plan], size: int) -> list[Plan]:
        """The plans that come near the best of them at some context."""
        curves = {plan: self.table.curve(plan.name, size) for plan in plans}
        places = sorted({t for curve in curves.values() if curve for t in curve.tokens})
        near: dict[Plan, None] = {}
        for tokens in places:
            times = {plan: curve.at(tokens) for plan, curve in curves.items() if curve}
            least = min(times.values())
            near |= {plan: None for plan, time in times.items() if time <= NEAR_BEST * least}
        return list(near)


def is_hopeless(ends: Sequence[Sample], sequential: Curve) -> bool:
    """Whether a plan is far slower than sequential decode at both ends of its curve."""
    return all(seconds > HOPELESS * sequential.at(tokens) for tokens, seconds in ends)


def calibration_key(model_config: Any, device: torch.device, **more: Any) -> dict[str, Any]:
    """What measured times depend on: device, versions, our kernels, model and further values."""
    import triton

    return {
        "kernels": hash_sources(Path(kernels.__path__[0])),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "model": dataclasses.asdict(model_config),
        **more,
    }


def hash_sources(folder: Path) -> str:
    """Changes with any Python file in a folder."""
    hasher = xxhash.xxh64()
    for path in sorted(folder.glob("*.py")):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()
