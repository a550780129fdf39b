"""What decode steps cost: measured samples, and the curves through them.

The time of a step depends on its plan (see planner.py), on its batch size and on the context
tokens of the whole batch. At a given batch size it rises with the tokens: first the dense work
bounds it, later attention does, so a pipelined step's curve is nearly max(dense, attention), flat
and then proportional, with a soft knee between, and a sequential step's is nearly a line. A few
samples give such a curve if they lie around its knee; `next_sample` finds out where that is:

    samples = []
    while (tokens := next_sample(samples, batch, longest_tokens)) is not None:
        samples.append((tokens, measure(plan, batch, tokens)))
    table.add(plan, batch, samples)

Tables are kept on disk between runs.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from nanovllm.utils.disk_cache import DiskCache

logger = logging.getLogger(__name__)

# (context tokens of the whole batch, seconds of the step)
Sample = tuple[int, float]

# No sample of a file is believed beyond these: context tokens, and seconds of a step.
MAX_TOKENS = 2**40
SHORTEST_STEP, LONGEST_STEP = 1e-7, 3600.0


class Curve:
    """Seconds of a step against context tokens: straight between the samples and beyond the last.

    Below the first sample the curve is flat, because dense work bounds a step of few tokens.

    Args:
        samples: at least one, at different token counts, in any order.
    """

    def __init__(self, samples: Iterable[tuple[int, float]]) -> None:
        points = sorted(samples)
        self.tokens = [tokens for tokens, _ in points]
        self.seconds = [seconds for _, seconds in points]
        slopes = [
            (after - before) / (right - left) for (left, before), (right, after) in pairwise(points)
        ]
        # A last slope below 0 is noise, and would run to negative times.
        self.slopes = [*slopes, max(slopes[-1], 0.0) if slopes else 0.0]

    def at(self, tokens: float) -> float:
        """Seconds at that many context tokens."""
        i = bisect_right(self.tokens, tokens) - 1
        if i < 0:
            return self.seconds[0]
        return self.seconds[i] + self.slopes[i] * (tokens - self.tokens[i])

    def mixed(self, other: Curve, share: float) -> Curve:
        """The curve between this one (at share 0) and the other (at share 1)."""
        return Curve(
            (tokens, (1 - share) * self.at(tokens) + share * other.at(tokens))
            for tokens in {*self.tokens, *other.tokens}
        )


class CostTable:
    """Samples by plan and batch size.

    A plan is given by its name, and a batch size is the graph's: sequences with padding.
    """

    def __init__(self) -> None:
        self._curves: dict[str, dict[int, Curve]] = {}
        self._between: dict[tuple[str, int], Curve | None] = {}  # made from _curves

    def add(self, plan: str, batch: int, samples: Sequence[Sample]) -> None:
        """Takes the samples of a plan at a batch size, in place of any earlier ones.

        Raises:
            ValueError: there are no samples, or one of them cannot be right.
        """
        where = f"samples of {plan!r} at batch {batch}"
        if batch < 1 or not samples:
            raise ValueError(f"{where}: at least one sample at a batch of at least 1 is needed")
        if len({tokens for tokens, _ in samples}) < len(samples):
            raise ValueError(f"{where}: {samples}: the token counts must differ")
        for tokens, seconds in samples:
            if tokens < 0 or not 0 < seconds < math.inf:
                raise ValueError(
                    f"{where}: ({tokens}, {seconds}): tokens must be at least 0, and seconds "
                    "positive and finite"
                )
        self._curves.setdefault(plan, {})[batch] = Curve(samples)
        self._between.clear()

    @property
    def plans(self) -> list[str]:
        """The plans that were measured."""
        return list(self._curves)

    def batches(self, plan: str) -> list[int]:
        """The batch sizes at which the plan was measured, rising."""
        return sorted(self._curves.get(plan, {}))

    def curve(self, plan: str, batch: int) -> Curve | None:
        """The plan's curve at that batch size: measured, or between its two neighbours.

        None if the batch size is outside what was measured.
        """
        key = (plan, batch)
        if key not in self._between:
            self._between[key] = self._interpolate(plan, batch)
        return self._between[key]

    def predict(self, plan: str, batch: int, tokens: float) -> float | None:
        """Seconds of a step; None if the batch size is outside what was measured."""
        curve = self.curve(plan, batch)
        return None if curve is None else curve.at(tokens)

    def _interpolate(self, plan: str, batch: int) -> Curve | None:
        curves, batches = self._curves.get(plan, {}), self.batches(plan)
        if not batches or not batches[0] <= batch <= batches[-1]:
            return None
        if batch in curves:
            return curves[batch]
        i = bisect_left(batches, batch)
        low, high = batches[i - 1], batches[i]
        return curves[low].mixed(curves[high], (batch - low) / (high - low))

    def to_json(self) -> dict[str, dict[str, list[list[float]]]]:
        """The table as plain values: plan -> batch size -> [tokens, seconds] of each sample."""
        return {
            plan: {
                str(batch): [list(point) for point in zip(c.tokens, c.seconds, strict=True)]
                for batch, c in curves.items()
            }
            for plan, curves in self._curves.items()
        }

    @staticmethod
    def from_json(value: Any) -> CostTable:
        """The table that `to_json` wrote.

        Raises:
            ValueError: the value is no such table.
        """
        table = CostTable()
        try:
            for plan, curves in value.items():
                for batch, samples in curves.items():
                    if str(int(batch)) != batch:
                        raise ValueError(f"not a batch size: {batch!r:.40}")
                    table.add(plan, int(batch), [_sample(*sample) for sample in samples])
        except (AttributeError, TypeError, OverflowError) as error:
            raise ValueError(f"not a cost table: {error}") from error
        return table

    def save(self, cache: DiskCache, key: Mapping[str, Any]) -> None:
        """Keeps the table on disk; the key says what the measured times depend on."""
        cache.write(key, self.to_json())

    @staticmethod
    def load(cache: DiskCache, key: Mapping[str, Any]) -> CostTable:
        """The table saved under that key; an empty one if there is none or it is damaged."""
        value = cache.read(key)
        if value is None:
            return CostTable()
        try:
            return CostTable.from_json(value)
        except ValueError as error:
            logger.warning("Cost table in the cache of %s is ignored: %.300s", cache.name, error)
            return CostTable()


def _sample(tokens: Any, seconds: Any) -> Sample:
    """A sample out of a file, if it can be true."""
    if type(tokens) is not int or type(seconds) not in (int, float):
        raise ValueError(f"not a sample: ({tokens!r:.40}, {seconds!r:.40})")
    if not (0 <= tokens <= MAX_TOKENS and SHORTEST_STEP <= seconds <= LONGEST_STEP):
        raise ValueError(f"not a plausible sample: ({tokens}, {seconds})")
    return tokens, float(seconds)


def next_sample(
    samples: Sequence[Sample],
    batch: int,
    longest_tokens: int,
    *,
    tolerance: float = 0.01,
    most: int = 6,
) -> int | None:
    """Where to measure a curve next.

    The curve is taken to be convex, and never steeper than a line through the origin, as
    max(dense, attention) is. Between two samples it then lies below their chord and above the
    neighbouring segments' continuations; where these two cross, the chord can be most wrong. There
    the next sample is due, in the segment with the largest such gap. A line is known after three
    samples, and so is a sharp knee.

    Args:
        samples: of one plan at this batch size, measured so far.
        batch: sequences; each gets the same context, so a sample is a multiple of it.
        longest_tokens: the most context tokens that fit.
        tolerance: the largest gap to leave, as a share of the time.
        most: the largest number of samples.

    Returns:
        Context tokens of the whole batch, one of at least `batch`; None: the samples do.
    """
    longest = max(longest_tokens // batch, 1) * batch
    if not samples:
        return batch
    points = sorted(samples)
    if len(points) == 1 and longest > batch:
        return longest
    if len(points) >= most:
        return None
    known = {tokens for tokens, _ in points}
    gaps: list[tuple[float, int]] = []
    for i in range(len(points) - 1):
        crossing = _crossing(points, i)
        if crossing is None:
            continue
        tokens, least = crossing
        (left, before), (right, after) = points[i : i + 2]
        chord = before + (after - before) * (tokens - left) / (right - left)
        multiple = round(tokens / batch) * batch
        if chord > least * (1 + tolerance) and multiple not in known:
            gaps.append((chord / least, multiple))
    return max(gaps)[1] if gaps else None


def _crossing(points: Sequence[Sample], i: int) -> tuple[float, float] | None:
    """Where, between points i and i + 1, the continuations of their neighbouring segments cross.

    None where they do not, because noise has bent the curve the other way.
    """
    (left, before), (right, after) = points[i : i + 2]
    rising = 0.0  # nothing is known before the first sample, but that the curve never falls
    if i > 0:
        rising = max((before - points[i - 1][1]) / (left - points[i - 1][0]), 0.0)
    steepest = after / right  # of a line through the origin
    if i + 2 < len(points):
        steepest = (points[i + 2][1] - after) / (points[i + 2][0] - right)
    if steepest <= rising:
        return None
    tokens = (before - after + steepest * right - rising * left) / (steepest - rising)
    if not left < tokens < right:
        return None
    return tokens, before + rising * (tokens - left)


def gain_bound(
    whole: Curve, half: Curve, longest_tokens: int, *, weight_tokens: float = 0.0
) -> float:
    """How many times as fast as sequential a pipeline can be at best, at any number of tokens.

    A pipelined step does the dense work of both halves of the batch, one after the other, and the
    attention of all of it, beside each other if all goes well. So it takes at least as long as
    either; nor is it faster than the memory, which delivers the weights and the KV cache both. A
    plan needs calibrating only where this bound is worth having.

    Args:
        whole: the sequential curve at the batch size in question.
        half: the sequential curve at half of it.
        longest_tokens: the most context tokens that fit.
        weight_tokens: context tokens whose KV cache is as large as the weights; 0: leave the
            memory out.
    """
    shortest, dense = whole.tokens[0], whole.seconds[0]
    longest = max(longest_tokens, shortest)
    halves = 2 * half.seconds[0]
    bandwidth_bound = weight_tokens * whole.slopes[-1]
    # The gain is largest where the two bounds meet, or at an end.
    meeting = min(max(_tokens_at(whole, dense + halves - bandwidth_bound), shortest), longest)

    def gain(tokens: float) -> float:
        attention = whole.at(tokens) - dense
        return whole.at(tokens) / max(halves, attention + bandwidth_bound)

    return max(gain(tokens) for tokens in (shortest, meeting, longest))


def _tokens_at(curve: Curve, seconds: float) -> float:
    """Where a rising curve reaches that many seconds."""
    i = max(bisect_right(curve.seconds, seconds) - 1, 0)
    if curve.slopes[i] <= 0:
        return math.inf if seconds > curve.seconds[i] else curve.tokens[i]
    return curve.tokens[i] + (seconds - curve.seconds[i]) / curve.slopes[i]
