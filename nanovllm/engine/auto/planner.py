"""Chooses the plan of each decode step: a table, a margin, and a guard.

The table predicts every plan. The fastest is taken if it gains enough over sequential decode, and
over the plan in use; sequential decode is taken back without a margin. Every plan has its graphs
at the sizes where it may be chosen, so a change costs nothing.

The guard is for what the table does not know. A pipelined plan that takes longer than sequential
decode was predicted to, many steps in a row, is dropped at that size for the rest of the run.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.engine.auto.cost_table import CostTable
from nanovllm.engine.plan import SEQUENTIAL_NUMBER, Choice, Plan

logger = logging.getLogger(__name__)

# A plan is taken if it gains so much over sequential decode and over the plan in use. The times are
# good to about 1%, so what is missed stays below 2%.
LEAST_GAIN = 1.01
# So many steps in a row are longer than a dip of the clocks at the power limit.
PATIENCE = 32


class Prediction(NamedTuple):
    """Seconds of a step by the plan with this number, at this size, and by sequential decode."""

    plan: int
    size: int
    seconds: float
    sequential_seconds: float


@dataclass
class PlanRecord:
    """Steps of a plan: chosen, and timed with a prediction; sums over the latter in seconds."""

    steps: int = 0
    timed: int = 0
    predicted: float = 0.0
    measured: float = 0.0

    def as_dict(self) -> dict[str, float | None]:
        """Steps, and mean times in ms; None where no step was timed."""
        predicted, measured = (
            1e3 * seconds / self.timed if self.timed else None
            for seconds in (self.predicted, self.measured)
        )
        return {"steps": self.steps, "predicted_ms": predicted, "measured_ms": measured}

    def __str__(self) -> str:
        text = "{steps} steps, predicted {predicted_ms:.2f} ms, measured {measured_ms:.2f} ms"
        return (text if self.timed else "{steps} steps, not measured").format(**self.as_dict())


@dataclass(eq=False)
class Planner:
    """Chooses among plans, of which sequential decode is the first, with graphs of these sizes."""

    table: CostTable
    plans: Sequence[Plan]
    sizes: Sequence[Sequence[int]]
    current: int | None = None  # the plan of the last step
    switches: int = 0

    def __post_init__(self) -> None:
        self.records = [PlanRecord() for _ in self.plans]
        self.dropped: set[tuple[int, int]] = set()  # plans at sizes
        self._slow_steps: Counter[tuple[int, int]] = Counter()  # in a row, of plans at sizes

    def choose(self, num_seqs: int, tokens: int) -> Choice:
        """The plan of a step of so many sequences, which have so many context tokens together.

        It comes with a `Prediction` if the table covers sequential decode.
        """
        sizes = [self._size(plan, num_seqs) for plan in range(len(self.plans))]
        seconds = {
            plan: self.table.seconds(plan, size, tokens)
            for plan, size in enumerate(sizes)
            if self.table.covers(plan, size) and (plan, size) not in self.dropped
        }
        plan, prediction = SEQUENTIAL_NUMBER, None
        sequential = seconds.get(SEQUENTIAL_NUMBER)
        if sequential is not None:
            plan = self._fastest(seconds)
            prediction = Prediction(plan, sizes[plan], seconds[plan], sequential)
        if plan != self.current:
            self.switches += self.current is not None
            self.current = plan
        self.records[plan].steps += 1
        return Choice(plan, sizes[plan], prediction)

    def observe(self, prediction: Prediction, seconds: float) -> None:
        """Takes the measured time of a step with the prediction of its choice."""
        record = self.records[prediction.plan]
        record.timed += 1
        record.predicted += prediction.seconds
        record.measured += seconds
        if prediction.plan == SEQUENTIAL_NUMBER:
            return
        place = prediction.plan, prediction.size
        is_slow = seconds > prediction.sequential_seconds
        self._slow_steps[place] = self._slow_steps[place] + 1 if is_slow else 0
        if self._slow_steps[place] == PATIENCE:
            self.dropped.add(place)
            logger.warning(
                "Plan %s is dropped for batches of %d: %d steps in a row took longer than "
                "sequential decode is predicted to; the last took %.2f ms instead of %.2f",
                self.plans[prediction.plan].name, prediction.size, PATIENCE, 1e3 * seconds,
                1e3 * prediction.sequential_seconds,
            )  # fmt: skip

    def _size(self, plan: int, num_seqs: int) -> int:
        """Of the smallest graph of a plan that holds so many sequences; 0 if none does."""
        i = bisect_left(self.sizes[plan], num_seqs)
        return self.sizes[plan][i] if i < len(self.sizes[plan]) else 0

    def _fastest(self, seconds: Mapping[int, float]) -> int:
        """The plan to take, given the predictions."""
        sequential = seconds[SEQUENTIAL_NUMBER]
        best = min(seconds, key=seconds.__getitem__)
        if seconds[best] * LEAST_GAIN > sequential:
            best = SEQUENTIAL_NUMBER
        if self.current is not None and self.current in seconds:
            now = seconds[self.current]
            if now <= min(sequential, seconds[best] * LEAST_GAIN):
                return self.current
        return best

    def as_dict(self) -> dict[str, object]:
        """Plan in use, switches, by plan its steps and mean times in ms, and what was dropped."""
        return {
            "plan": None if self.current is None else self.plans[self.current].name,
            "switches": self.switches,
            "plans": {p.name: r.as_dict() for p, r in zip(self.plans, self.records, strict=True)},
            "dropped": [[self.plans[plan].name, size] for plan, size in sorted(self.dropped)],
        }

    def lines(self) -> list[str]:
        """The same for people, without the plans that were never chosen."""
        if self.current is None:
            return []
        times = "time" if self.switches == 1 else "times"
        lines = [f"Plan: {self.plans[self.current].name} (switched {self.switches} {times})"]
        named = zip(self.plans, self.records, strict=True)
        lines += [f"{plan.name}: {record}" for plan, record in named if record.steps]
        for number, size in sorted(self.dropped):
            lines.append(f"{self.plans[number].name}: dropped for batches of {size}, too slow")
        return lines
