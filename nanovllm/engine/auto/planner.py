"""Chooses the plan of each decode step: a table, a margin, and a guard.

    planner = Planner(table, plans, [[1, 2, 4, 8, 16], [8, 16]])  # sizes of each plan's graphs
    choice = planner.choose(num_seqs=13, tokens=13 * 500)
    planner.observe(choice, seconds_measured)

The table predicts every plan. The fastest is taken if it gains enough over sequential decode, and
over the plan in use. All plans have their graphs, so a change costs nothing.

The guard is for what the table does not know, such as sizes between those that were measured. A
pipelined plan that takes longer than sequential decode was predicted to, many steps in a row, is
dropped at that size for the rest of the run.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.engine.auto.cost_table import CostTable
from nanovllm.engine.plan import Plan

logger = logging.getLogger(__name__)

SEQUENTIAL_NUMBER = 0  # of the plan that any step can run
# A plan is taken if it gains so much over sequential decode and over the plan in use. The times are
# good to about 1%, so what is missed stays below 2%.
LEAST_GAIN = 1.01
# So many steps in a row are longer than a dip of the clocks at the power limit.
PATIENCE = 32


class PlanChoice(NamedTuple):
    """The plan of a step.

    Attributes:
        plan: its number.
        size: sequences with padding, of its graph.
        seconds: predicted; None where nothing was measured.
        sequential_seconds: predicted of sequential decode.
    """

    plan: int
    size: int
    seconds: float | None = None
    sequential_seconds: float | None = None


@dataclass
class PlanRecord:
    """Steps of a plan: chosen, and timed with a prediction; sums over the latter in seconds."""

    steps: int = 0
    timed: int = 0
    predicted_seconds: float = 0.0
    measured_seconds: float = 0.0


class Planner:
    """Chooses among plans that have graphs.

    Args:
        table: what was measured; it may still be empty.
        plans: sequential decode is the first.
        sizes: of the graphs of each plan, rising.
    """

    def __init__(
        self, table: CostTable, plans: Sequence[Plan], sizes: Sequence[Sequence[int]]
    ) -> None:
        self.table = table
        self.plans = plans
        self.sizes = sizes
        self.current: int | None = None  # the plan of the last step
        self.switches = 0
        self.records = [PlanRecord() for _ in plans]
        self.dropped: set[tuple[int, int]] = set()  # plans at sizes
        self._slow_steps: Counter[tuple[int, int]] = Counter()  # in a row, of plans at sizes

    def choose(self, num_seqs: int, tokens: int) -> PlanChoice:
        """The plan of the next step.

        Args:
            num_seqs: sequences without padding, no more than the largest graph holds.
            tokens: their context tokens together.
        """
        choices = self._candidates(num_seqs, tokens)
        plan = self._fastest({plan: choice.seconds or 0.0 for plan, choice in choices.items()})
        if plan != self.current:
            self.switches += self.current is not None
            self.current = plan
        self.records[plan].steps += 1
        return choices[plan]

    def observe(self, choice: PlanChoice, seconds: float) -> None:
        """Takes the measured time of a chosen step."""
        if choice.seconds is None or choice.sequential_seconds is None:
            return
        record = self.records[choice.plan]
        record.timed += 1
        record.predicted_seconds += choice.seconds
        record.measured_seconds += seconds
        place = choice.plan, choice.size
        if choice.plan == SEQUENTIAL_NUMBER or place in self.dropped:
            return
        is_slow = seconds > choice.sequential_seconds
        self._slow_steps[place] = self._slow_steps[place] + 1 if is_slow else 0
        if self._slow_steps[place] == PATIENCE:
            self.dropped.add(place)
            name = self.plans[choice.plan].name
            logger.warning(
                "Plan %s is dropped for batches of %d: %d steps in a row took longer than "
                "sequential decode is predicted to; the last took %.2f ms instead of %.2f",
                name, choice.size, PATIENCE, 1e3 * seconds, 1e3 * choice.sequential_seconds,
            )  # fmt: skip

    def _candidates(self, num_seqs: int, tokens: int) -> dict[int, PlanChoice]:
        """What can run the step, by plan: sequential decode, and pipelines with a prediction."""
        size = self.sizes[SEQUENTIAL_NUMBER][bisect_left(self.sizes[SEQUENTIAL_NUMBER], num_seqs)]
        if not self.table.covers(SEQUENTIAL_NUMBER, size):
            return {SEQUENTIAL_NUMBER: PlanChoice(SEQUENTIAL_NUMBER, size)}
        sequential = self.table.seconds(SEQUENTIAL_NUMBER, size, tokens)
        choices = {SEQUENTIAL_NUMBER: PlanChoice(SEQUENTIAL_NUMBER, size, sequential, sequential)}
        for plan in range(1, len(self.plans)):
            size = next((size for size in self.sizes[plan] if size >= num_seqs), 0)
            if self.table.covers(plan, size) and (plan, size) not in self.dropped:
                seconds = self.table.seconds(plan, size, tokens)
                choices[plan] = PlanChoice(plan, size, seconds, sequential)
        return choices

    def _fastest(self, seconds: dict[int, float]) -> int:
        """The plan to take, given the predictions."""
        sequential = seconds[SEQUENTIAL_NUMBER]
        best = min(seconds, key=seconds.__getitem__)
        if seconds[best] * LEAST_GAIN > sequential:
            best = SEQUENTIAL_NUMBER
        if self.current in seconds:
            now = seconds[self.current]
            if now <= min(sequential, seconds[best] * LEAST_GAIN):
                return self.current
        return best

    def as_dict(self) -> dict[str, object]:
        """Plan in use, switches, by plan its steps and mean times in ms, and what was dropped."""
        named = list(zip(self.plans, self.records, strict=True))
        return {
            "plan": None if self.current is None else self.plans[self.current].name,
            "switches": self.switches,
            "plans": {
                plan.name: {
                    "steps": record.steps,
                    "predicted_ms": _mean_ms(record.predicted_seconds, record.timed),
                    "measured_ms": _mean_ms(record.measured_seconds, record.timed),
                }
                for plan, record in named
            },
            "dropped": [[self.plans[plan].name, size] for plan, size in sorted(self.dropped)],
        }

    def lines(self) -> list[str]:
        """The same for people, without the plans that were never chosen."""
        if self.current is None:
            return []
        times = "time" if self.switches == 1 else "times"
        lines = [f"Plan: {self.plans[self.current].name} (switched {self.switches} {times})"]
        for plan, record in zip(self.plans, self.records, strict=True):
            if record.timed:
                predicted = _mean_ms(record.predicted_seconds, record.timed)
                measured = _mean_ms(record.measured_seconds, record.timed)
                lines.append(
                    f"{plan.name}: {record.steps} steps, predicted {predicted:.2f} ms, "
                    f"measured {measured:.2f} ms"
                )
            elif record.steps:
                lines.append(f"{plan.name}: {record.steps} steps, not measured")
        for number, size in sorted(self.dropped):
            lines.append(f"{self.plans[number].name}: dropped for batches of {size}, too slow")
        return lines


def _mean_ms(seconds: float, steps: int) -> float | None:
    return 1000 * seconds / steps if steps else None
