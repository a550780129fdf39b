"""Measures, at start-up, what decode steps cost under each plan; the times are kept on disk.

Steps run on made-up inputs: sequences of one length, whose keys and values are whatever random
numbers the cache was filled with. Sequential decode is measured first, at a few batch sizes. From
that, `gain_bound` says how much a pipeline could gain at best; only where that is something are
pipelines captured and measured, the largest batch first. Of the splits only those go on to the
smaller batches that came near the best one there. Batch sizes between are interpolated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import xxhash
from tqdm import tqdm

from nanovllm import kernels
from nanovllm.engine.cost_table import CostTable, Sample, gain_bound, next_sample
from nanovllm.engine.decode_runner import DecodeRunner, DecodeStep
from nanovllm.engine.planner import Plan
from nanovllm.engine.step_inputs import InputLayout
from nanovllm.utils.disk_cache import DiskCache

SIZE_STEP = 128
# Above so many sequences, every second multiple will do.
MANY = 512
# No less is worth a pipeline's graphs.
LEAST_GAIN = 1.02
# A split that is slower than the best one by more, at every context, is given up.
NEAR_BEST = 1.04
SAMPLES = 5
# Of steps behind each sample, and at least so many; the first third does not count.
SECONDS = 0.06
FEWEST_STEPS = 6

# Seconds of a step of `batch` sequences with so many context tokens together.
StepTimer = Callable[[DecodeRunner, int, int], float]


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

    def run(
        self, ways: Mapping[Plan, DecodeRunner], *, show_progress: bool
    ) -> dict[Plan, list[int]]:
        """Fills the table, from disk or by measuring.

        Args:
            ways: decode runners by plan; the first is sequential.
            show_progress: whether to show a progress bar.

        Returns:
            Of every plan but the first, the batch sizes at which it can be worth its graphs.
        """
        if not pipelined_sizes(self.largest):
            return {}
        key = self.key | {"plans": [plan.name for plan in ways]}
        self.table = CostTable.load(self.cache, key)
        sequential = next(iter(ways))
        if not self.table.batches(sequential.name):
            with tqdm(desc="Calibrating plans", unit="step", disable=not show_progress) as bar:
                self._measure(ways, bar)
            self.table.save(self.cache, key)
        worthwhile = self._worthwhile(sequential)
        return {
            plan: [size for size in worthwhile if self.table.curve(plan.name, size) is not None]
            for plan in ways
            if plan is not sequential
        }

    def _measure(self, ways: Mapping[Plan, DecodeRunner], bar: Any) -> None:
        sequential, *pipelines = ways
        sizes = measured_sizes(self.largest)
        halves = [size // 2 for size in sizes if size // 2 not in sizes]
        for size in [*sizes, *halves]:
            self._measure_curve(sequential, ways[sequential], size, bar)
        worthwhile = self._worthwhile(sequential)
        for size in sizes:
            if size not in worthwhile:
                continue
            for plan in pipelines:
                self._measure_curve(plan, ways[plan], size, bar)
            pipelines = self._near_best(pipelines, size)

    def _measure_curve(self, plan: Plan, way: DecodeRunner, size: int, bar: Any) -> None:
        bar.set_postfix_str(f"{plan.name}, batch {size}")
        samples: list[Sample] = []
        longest = self.longest_tokens(size)
        while (tokens := next_sample(samples, size, longest, most=SAMPLES)) is not None:
            samples.append((tokens, self.timer(way, size, tokens)))
            bar.update()
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


class DeviceTimer:
    """Times decode steps on a CUDA device, from their inputs' copy to their logits.

    NOTE: the first call overwrites the whole KV cache with random numbers.

    Args:
        device: where.
        kv_caches: all tensors of the KV cache.
        num_blocks, block_size, tile_size: see `fill_steady`.
    """

    def __init__(
        self,
        device: torch.device,
        kv_caches: Sequence[torch.Tensor],
        num_blocks: int,
        block_size: int,
        tile_size: int,
    ) -> None:
        self.device = device
        self.unfilled = list(kv_caches)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.tile_size = tile_size

    @torch.inference_mode()
    def __call__(self, way: DecodeRunner, batch: int, tokens: int) -> float:
        """Median seconds of a step of `batch` sequences that have `tokens` tokens together."""
        while self.unfilled:  # zeros would take less power, hence less time
            self.unfilled.pop().normal_()
        layout = way.layout(batch)
        flat = torch.empty(layout.size, dtype=torch.int32, pin_memory=True)
        fill_steady(
            layout, tokens // batch, self.num_blocks, self.block_size, self.tile_size, flat.numpy()
        )
        step = DecodeStep(layout, None)
        first = self._times(way, step, flat, 3)[-1]  # the first captures and warms up
        count = max(FEWEST_STEPS, round(SECONDS / first))
        return median(self._times(way, step, flat, count)[count // 3 :])

    def _times(
        self, way: DecodeRunner, step: DecodeStep, flat: torch.Tensor, count: int
    ) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            way.run(step, flat, self.device)
            mark.record()
        marks[-1].synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in pairwise(marks)]


def fill_steady(
    layout: InputLayout,
    context: int,
    num_blocks: int,
    block_size: int,
    tile_size: int,
    flat: np.ndarray,
) -> None:
    """Inputs of a decode step in which every sequence has `context` tokens.

    Their blocks are scattered over the cache, and shared only if there are not enough of them.

    Args:
        layout: of `flat`.
        context: tokens of each sequence, at least 1.
        num_blocks: KV blocks; block 0 is padding.
        block_size: tokens of a block.
        tile_size: the attention back end's.
        flat: int32 [layout.size], overwritten.
    """
    views = layout.views(flat)
    count, needed = layout.num_seqs, -(-context // block_size)
    rng = np.random.default_rng(0)
    blocks = 1 + np.resize(rng.permutation(num_blocks), count * needed).reshape(count, needed)
    views["block_tables"].fill(0)
    views["block_tables"][:, :needed] = blocks
    last = context - 1
    views["input_ids"].fill(0)
    views["positions"].fill(last)
    views["slot_mapping"][:] = blocks[:, last // block_size] * block_size + last % block_size
    views["context_lens"].fill(context)
    views["tile_offsets"][:] = np.arange(count + 1) * -(-context // tile_size)
    if "sample_rows" in views:
        views["sample_rows"][:] = np.arange(count)


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
