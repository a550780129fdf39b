"""Chooses, before every decode step, which captured way of running it is the fastest.

    planner = Planner(table, {SEQUENTIAL: [1, 2, 4, 8, 16], GREEN.with_sms((36, 96)): [8, 16]})
    choice = planner.choose(num_seqs=13, tokens=13 * 500)  # .plan, .batch, .seconds
    planner.observe(choice, seconds_measured)

The prediction is the cost table's, times a correction learned from measured steps. A plan is left
for another one only if that is predicted to be faster by a margin, several steps in a row, and all
plans but the default one carry a handicap: what they gain must be worth being wrong about; where
the batch or the context has changed at a stroke, the best is taken at once.

Only the plan in use is measured, and that is what makes correcting hard. If it gets slower than
predicted, is it this plan, or is it the device, whose clocks fell under all plans alike? Blaming
the plan alone sends the engine round all other plans whenever the clocks change, and leaves stale
corrections behind; blaming the device alone never leaves a plan that was calibrated wrongly.
`Corrections` does neither: it keeps a factor of the device and one of each plan, and how sure it
is of each, and blames in proportion to its doubt. A plan that was just entered is in doubt, so what
it shows is its own; after some steps it is known, so a change is the device's and moves no plan
against another. Should that have been wrong, a second plan shows it: both look alike slow, so it
was the device, or they do not. A plan that is faster than predicted gains nothing on plans never
measured beside it, which might be, too. And as corrections fade with time and with every change
of batch and context, a plan that was given up, or one that was blamed wrongly, is tried again one
day. A trial costs a few steps at the difference between two plans; being stuck costs that for ever.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from nanovllm.engine.cost_table import CostTable
from nanovllm.engine.plan import Plan

# Doublings of the batch and of its context tokens together at which hysteresis ends, and those
# that are worth telling the corrections.
JUMP = 1.0
MOVE = 0.25


class Choice(NamedTuple):
    """A plan for one step.

    Attributes:
        plan: the plan.
        batch: size of its graph: the step's sequences with padding.
        seconds: predicted; None without a calibration.
        table_seconds: the same before correction.
    """

    plan: Plan
    batch: int
    seconds: float | None
    table_seconds: float | None


@dataclass
class PlanRecord:
    """Steps of one plan: chosen, measured with a prediction, and the sums over the latter in s."""

    chosen: int = 0
    measured: int = 0
    predicted_seconds: float = 0.0
    measured_seconds: float = 0.0


class Planner:
    """Decides between graphs that exist.

    Args:
        table: what was measured; it may grow later.
        sizes: the graph sizes captured for each plan. The first plan is the default: it runs what
            is not calibrated for it, because nothing can be known to be faster.
        margin: how much faster another plan must be, as a share of the time.
        patience: for how many steps in a row.
        handicap: share of the time by which any plan must be faster than the default one to be
            worth it at all; where less is to be gained, being wrong costs more.

    Raises:
        ValueError: there are no plans, two have one name, or a number is out of range.
    """

    def __init__(
        self,
        table: CostTable,
        sizes: Mapping[Plan, Iterable[int]],
        *,
        margin: float = 0.01,
        patience: int = 4,
        handicap: float = 0.01,
    ) -> None:
        if not 0 <= margin < 1 or patience < 1 or not 0 <= handicap < 1:
            raise ValueError(
                f"margin={margin}, patience={patience}, handicap={handicap}: margin and handicap "
                "must be at least 0 and below 1, patience at least 1"
            )
        self.plans = list(sizes)
        if not sizes or len({plan.name for plan in sizes}) < len(sizes):
            raise ValueError(f"sizes={dict(sizes)}: at least one plan, each under its own name")
        self.table = table
        self.margin = margin
        self.patience = patience
        self.handicap = handicap
        self.switches = 0
        self.records = {plan: PlanRecord() for plan in self.plans}
        self._sizes = [sorted(ladder) for ladder in sizes.values()]
        self._corrections = Corrections(len(self.plans))
        self._current: int | None = None
        self._behind = 0  # steps in a row in which another plan was better by the margin
        self._place: tuple[float, float] | None = None

    @property
    def current(self) -> Plan | None:
        """The plan of the last step."""
        return None if self._current is None else self.plans[self._current]

    def add_size(self, plan: Plan, size: int) -> None:
        """Says that a graph of that plan and size exists from now on."""
        sizes = self._sizes[self.plans.index(plan)]
        if size not in sizes:
            insort(sizes, size)

    def choose(self, num_seqs: int, tokens: int) -> Choice:
        """The plan for the next step; to be called once a step.

        Args:
            num_seqs: sequences without padding.
            tokens: their context tokens together.

        Raises:
            ValueError: the default plan has no graph for so many sequences.
        """
        jumped = self._move(num_seqs, tokens)
        choices = self._candidates(num_seqs, tokens)
        index = min(choices, key=lambda i: self._cost(i, choices))
        if self._current in choices and not jumped:
            index = self._stay_or(index, choices)
        else:
            self._behind = 0
        if self._current is not None and index != self._current:
            self.switches += 1
        self._current = index
        self.records[self.plans[index]].chosen += 1
        return choices[index]

    def observe(self, choice: Choice, seconds: float) -> None:
        """Learns how long a chosen step really took.

        Raises:
            ValueError: that is no time.
        """
        if not 0 < seconds < math.inf:
            raise ValueError(f"seconds={seconds}: a positive, finite time is needed")
        if choice.seconds is None or choice.table_seconds is None:
            return
        record = self.records[choice.plan]
        record.measured += 1
        record.predicted_seconds += choice.seconds
        record.measured_seconds += seconds
        ratio = math.log(seconds / choice.table_seconds)
        self._corrections.observe(self.plans.index(choice.plan), ratio)

    def as_dict(self) -> dict[str, object]:
        """Plan in use, switches, and by plan its steps and mean times in ms, None without any."""
        return {
            "plan": None if self.current is None else self.current.name,
            "switches": self.switches,
            "plans": {
                plan.name: {
                    "steps": record.chosen,
                    "predicted_ms": _mean_ms(record.predicted_seconds, record.measured),
                    "measured_ms": _mean_ms(record.measured_seconds, record.measured),
                }
                for plan, record in self.records.items()
            },
        }

    def lines(self) -> list[str]:
        """The same for people, without the plans that were never chosen."""
        if self.current is None:
            return []
        times = "time" if self.switches == 1 else "times"
        lines = [f"Plan: {self.current.name} (switched {self.switches} {times})"]
        for plan, record in self.records.items():
            if record.measured:
                predicted = _mean_ms(record.predicted_seconds, record.measured)
                measured = _mean_ms(record.measured_seconds, record.measured)
                lines.append(
                    f"{plan.name}: {record.chosen} steps, predicted {predicted:.2f} ms, "
                    f"measured {measured:.2f} ms"
                )
            elif record.chosen:
                lines.append(f"{plan.name}: {record.chosen} steps, not measured")
        return lines

    def _candidates(self, num_seqs: int, tokens: int) -> dict[int, Choice]:
        """What can run the step, by the plan's index: all that is calibrated, or the default."""
        choices: dict[int, Choice] = {}
        for i, (plan, sizes) in enumerate(zip(self.plans, self._sizes, strict=True)):
            rung = bisect_left(sizes, num_seqs)
            if rung == len(sizes):
                if i == 0:
                    raise ValueError(
                        f"num_seqs={num_seqs}: the largest graph of {plan.name!r} holds "
                        f"{max(sizes, default=0)}"
                    )
                continue
            curve = self.table.curve(plan.name, sizes[rung])
            if curve is not None:
                seconds = curve.at(tokens)
                corrected = seconds * self._corrections.factors[i]
                choices[i] = Choice(plan, sizes[rung], corrected, seconds)
            elif i == 0:
                return {0: Choice(plan, sizes[rung], None, None)}
        return choices

    def _cost(self, index: int, choices: Mapping[int, Choice]) -> float:
        """What is compared: seconds, and on all plans but the default one the handicap."""
        seconds = choices[index].seconds or 0.0
        return seconds if index == 0 else seconds * (1 + self.handicap)

    def _stay_or(self, best: int, choices: Mapping[int, Choice]) -> int:
        """Hysteresis: the index of the plan in use, or of the best if it is clearly better."""
        assert self._current is not None
        now, then = self._cost(self._current, choices), self._cost(best, choices)
        if then >= now * (1 - self.margin):
            self._behind = 0
            return self._current
        self._behind += 1
        if self._behind < self.patience:
            return self._current
        self._behind = 0
        return best

    def _move(self, num_seqs: int, tokens: int) -> bool:
        """Tells the corrections of a change of place; returns whether it was a jump."""
        place = (math.log2(num_seqs), math.log2(max(tokens, 1)))
        if self._place is None:
            self._place = place
            return True
        doublings = abs(place[0] - self._place[0]) + abs(place[1] - self._place[1])
        if doublings >= MOVE:
            self._place = place
            self._corrections.move(doublings)
        return doublings >= JUMP


class Corrections:
    """How much slower than the table says the device and each plan are: a Kalman filter.

    The model, in logarithms: measured / table = device + plan + noise. The device's part and every
    plan's are 0 on average and wander: the device's quickly, a plan's slowly with time but quickly
    as batch and context change. `move` and `observe` keep the mean and the covariance of all parts
    given what was measured. The covariance is what tells two plans apart from the device: the sum
    of two parts may be well known while neither part is.

    DEVICE, PLAN and NOISE are standard deviations in shares of the time (0.1: 10%). In so many
    STEPS or DOUBLINGS (of batch and tokens) a part falls back to a third.
    """

    DEVICE = 0.04
    DEVICE_STEPS = 200
    # As long as nothing is known, a plan is blamed rather than the device: a needless trial of
    # another plan costs less than staying with a wrong one.
    DEVICE_AT_FIRST = 0.02
    PLAN = 0.1
    PLAN_STEPS = 5000
    PLAN_DOUBLINGS = 2.0
    NOISE = 0.02
    # A step is judged by the median of so many, so that one outlier is nothing, and by no more than
    # so many standard deviations at a time, so that two are little.
    WINDOW = 3
    SURPRISE = 3

    def __init__(self, num_plans: int) -> None:
        self.factors = [1.0] * num_plans  # of each plan's predicted time, the device's included
        self._mean = np.zeros(1 + num_plans)  # the device's part, then the plans'
        self._wide = np.array([self.DEVICE] + [self.PLAN] * num_plans) ** 2
        self._covariance = np.diag(self._wide)
        self._covariance[0, 0] = self.DEVICE_AT_FIRST**2
        steps = np.array([self.DEVICE_STEPS] + [self.PLAN_STEPS] * num_plans)
        self._kept_a_step = np.exp(-1 / steps)
        self._plan: int | None = None
        self._recent: deque[float] = deque(maxlen=self.WINDOW)

    def move(self, doublings: float) -> None:
        """Forgets part of what is known of the plans, after a change of batch or context."""
        kept = np.full(len(self._mean), math.exp(-doublings / self.PLAN_DOUBLINGS))
        kept[0] = 1.0
        self._forget(kept)
        self._publish()

    def observe(self, plan: int, ratio: float) -> None:
        """Takes the logarithm of measured / table of a step of that plan."""
        self._forget(self._kept_a_step)
        if plan != self._plan:
            self._plan = plan
            self._recent.clear()
        self._recent.append(ratio)
        if len(self._recent) == self.WINDOW:
            self._update(1 + plan, median(self._recent))
        self._publish()

    def _update(self, part: int, ratio: float) -> None:
        """The filter's step: blames the device and the plan in proportion to their doubt."""
        doubt = self._covariance[0] + self._covariance[part]  # covariance with their sum
        variance = float(doubt[0] + doubt[part]) + self.NOISE**2
        gain = doubt / variance
        error = ratio - float(self._mean[0] + self._mean[part])
        limit = self.SURPRISE * math.sqrt(variance)
        self._mean += gain * min(max(error, -limit), limit)
        if abs(error) <= limit:  # or else it makes nothing more certain
            self._covariance -= gain[:, None] * doubt

    def _forget(self, kept: np.ndarray) -> None:
        """Lets every part fall back towards 0, to this share, and widens its doubt in turn."""
        self._mean *= kept
        self._covariance *= kept[:, None] * kept
        self._covariance.ravel()[:: len(kept) + 1] += (1 - kept * kept) * self._wide

    def _publish(self) -> None:
        logs = self._mean[0] + self._mean[1:]
        if self._plan is not None and self._mean[1 + self._plan] < 0:
            logs += self._mean[1 + self._plan] * self._strangeness(1 + self._plan)
        self.factors = np.exp(logs).tolist()

    def _strangeness(self, part: int) -> np.ndarray:
        """How unknown every plan is beside that one, from 0 to 1: never measured.

        A plan that does better than expected is no reason to stay: strangers might do as well, and
        are given the benefit of the doubt.
        """
        variance = self._covariance.diagonal()[1:]
        own = variance[part - 1]
        difference = variance + own - 2 * self._covariance[part, 1:]
        return np.minimum(difference / (self.PLAN**2 + own), 1.0)


def _mean_ms(seconds: float, steps: int) -> float | None:
    return 1000 * seconds / steps if steps else None
