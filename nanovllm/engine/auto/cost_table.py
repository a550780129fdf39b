"""What decode steps cost: seconds that were measured, and straight lines between them."""

from __future__ import annotations

from bisect import bisect_left, insort

# Context tokens of the whole batch and seconds of the step, rising in tokens.
Curve = list[tuple[int, float]]


class CostTable:
    """Seconds by the number of a step's plan, its size with padding, and its context tokens."""

    def __init__(self) -> None:
        self._curves: dict[int, dict[int, Curve]] = {}

    def add(self, plan: int, size: int, tokens: int, seconds: float) -> None:
        """Takes a measured time; each place is measured once."""
        insort(self._curves.setdefault(plan, {}).setdefault(size, []), (tokens, seconds))

    def curves(self, plan: int) -> dict[int, Curve]:
        """What was measured of a plan, by size."""
        return self._curves.get(plan, {})

    def covers(self, plan: int, size: int) -> bool:
        """Whether the plan was measured at that size, or at a smaller and at a larger one."""
        sizes = self.curves(plan)
        return bool(sizes) and min(sizes) <= size <= max(sizes)

    def seconds(self, plan: int, size: int, tokens: int) -> float:
        """Predicted time of a step; LookupError if the table does not cover the size."""
        curves = self.curves(plan)
        if size in curves:
            return seconds_at(curves[size], tokens)
        if not self.covers(plan, size):
            raise LookupError(f"plan {plan} was not measured around batch {size}")
        smaller, larger = max(s for s in curves if s < size), min(s for s in curves if s > size)
        share = (size - smaller) / (larger - smaller)
        low, high = seconds_at(curves[smaller], tokens), seconds_at(curves[larger], tokens)
        return (1 - share) * low + share * high


def seconds_at(curve: Curve, tokens: int) -> float:
    """Straight between the points and beyond the last, flat before the first."""
    i = min(bisect_left(curve, (tokens, 0.0)), len(curve) - 1)
    if i == 0:
        return curve[0][1]
    (left, before), (right, after) = curve[i - 1 : i + 1]
    slope = (after - before) / (right - left)
    if tokens > right:
        return after + max(slope, 0.0) * (tokens - right)  # or noise could run below 0
    return before + slope * (tokens - left)
