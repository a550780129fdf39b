"""A GPU with plans to run steps by: what they cost, a calibration of that, and runs of steps.

A run's regret is how much longer it took than the best plan of every single step, known beforehand,
would have.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.auto.calibration import Calibration, pipelined_sizes
from nanovllm.engine.auto.planner import Planner
from nanovllm.engine.graph_memory import batch_sizes
from nanovllm.engine.plan import GREEN, SEQUENTIAL, STREAMS, Plan

SILLY = GREEN.with_sms((16, 16))
SPLITS = [GREEN.with_sms((attention, 132 - attention)) for attention in (28, 36, 44, 52, 60)]
PLANS = [SEQUENTIAL, STREAMS, SILLY, *SPLITS]
LARGEST = 1024
CAPACITY = 4_000_000
MAX_LEN = 8192


class NoCache:
    """As a `DiskCache` that is always empty."""

    def read(self, key: Mapping[str, Any]) -> None:
        pass

    def write(self, key: Mapping[str, Any], value: Any) -> None:
        pass


@dataclass
class Gpu:
    """What steps take, in seconds.

    The dense work reads the weights or is bound by arithmetic; attention is bound by bandwidth,
    which rises with its SMs and levels off.

    Attributes:
        slower: by plan, how many times as slow it is in a run as it was calibrated.
        noise: standard deviation of a measured time, as a share.
        dips: every 400 steps clocks fall for so many, and all takes 1.2 times as long.
    """

    weights: float = 3.5e-3
    per_seq: float = 14e-6
    bandwidth: float = 28e6
    sharpness: float = 8.0
    overlap: float = 1.08
    slower: dict[Plan, float] = field(default_factory=dict)
    noise: float = 0.0
    dips: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def dense(self, batch: float) -> float:
        return math.hypot(self.weights, self.per_seq * batch)

    def calibrated(self, plan: Plan, batch: int, tokens: int) -> float:
        """What a step takes during calibration."""
        if plan == SEQUENTIAL:
            return self.dense(batch) + tokens / self.bandwidth
        ffn, attention = 1.0, 1.0
        attention_sms, ffn_sms = (lane.sms for lane in plan.lanes)
        if attention_sms is not None and ffn_sms is not None:
            ffn = ffn_sms / 110
            attention = 1 - math.exp(-attention_sms / 34)
        halves = 2 * self.dense(batch / 2) / min(ffn, 1)
        reading = tokens / self.bandwidth / attention
        both = (halves**self.sharpness + reading**self.sharpness) ** (1 / self.sharpness)
        if plan == STREAMS:
            both = 0.6 * both + 0.4 * (halves + reading)
        return both * self.overlap

    def true(self, plan: Plan, batch: int, tokens: int) -> float:
        """What a step takes in a run."""
        return self.calibrated(plan, batch, tokens) * self.slower.get(plan, 1.0)

    def measured(self, seconds: float) -> float:
        return seconds * math.exp(self.random.gauss(0, self.noise))

    def planner(self) -> Planner:
        """A planner after a calibration, which is as noisy as steps are."""

        def timer(plan: int, batch: int, tokens: int) -> float:
            return self.measured(self.calibrated(PLANS[plan], batch, tokens))

        cache: Any = NoCache()
        calibration = Calibration(timer, LARGEST, CAPACITY, MAX_LEN, {}, cache)
        sizes = calibration.run(PLANS, show_progress=False)
        sizes[0] = batch_sizes(LARGEST)
        return Planner(calibration.table, PLANS, sizes)


@dataclass
class Run:
    """Steps that were run: the plan of each, what it took, and what all plans would have."""

    plans: list[Plan] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    costs: list[dict[Plan, float]] = field(default_factory=list)

    def regret(self, start: int = 0) -> float:
        """How much longer the steps took than the best of each, as a share."""
        best = sum(min(costs.values()) for costs in self.costs[start:])
        return sum(self.taken[start:]) / best - 1

    def best_fixed(self) -> float:
        """What the steps would have taken under the best plan for the whole run."""
        return min(sum(costs[plan] for costs in self.costs) for plan in PLANS)

    @property
    def switches(self) -> int:
        return sum(a != b for a, b in zip(self.plans, self.plans[1:], strict=False))


def drive(planner: Planner, gpu: Gpu, steps: Iterable[tuple[int, int]]) -> Run:
    """Runs steps, given as (num_seqs, tokens)."""
    run = Run()
    for number, (num_seqs, tokens) in enumerate(steps):
        choice = planner.choose(num_seqs, tokens)
        plan = PLANS[choice.plan]
        dip = 1.2 if number % 400 < gpu.dips else 1.0
        run.plans.append(plan)
        run.costs.append(true_costs(gpu, num_seqs, tokens))
        run.taken.append(gpu.true(plan, choice.size, tokens))
        planner.observe(choice, dip * gpu.measured(run.taken[-1]))
    return run


def true_costs(gpu: Gpu, num_seqs: int, tokens: int) -> dict[Plan, float]:
    """What a step takes under every plan that may have a graph for it."""
    costs = {}
    for plan in PLANS:
        sizes = batch_sizes(LARGEST) if plan == SEQUENTIAL else pipelined_sizes(LARGEST)
        size = next(size for size in sizes if size >= num_seqs)
        costs[plan] = gpu.true(plan, size, tokens)
    return costs


def random_run(seed: int) -> Run:
    """A run of a random GPU, calibrated with noise, where one plan was calibrated far too well."""
    chance = random.Random(seed)
    gpu = Gpu(
        weights=chance.uniform(0.5e-3, 6e-3),
        per_seq=chance.uniform(2e-6, 30e-6),
        bandwidth=chance.uniform(10e6, 100e6),
        sharpness=chance.uniform(4, 30),
        overlap=chance.uniform(1.0, 1.2),
        noise=chance.uniform(0, 0.01),
        random=chance,
    )
    planner = gpu.planner()
    gpu.slower = {chance.choice(SPLITS): chance.uniform(1, 1.3)}
    return drive(planner, gpu, workload(chance))


def workload(chance: random.Random) -> Iterable[tuple[int, int]]:
    """2000 steps: requests come and go, contexts grow, now and then all of it changes."""
    num_seqs, context = 512, 512.0
    for step in range(2000):
        if step % 500 == 0:
            num_seqs, context = chance.choice([8, 128, 256, 512, 1024]), chance.uniform(64, 3000)
        num_seqs = min(max(num_seqs + chance.randint(-2, 2), 1), LARGEST)
        context = min(context * 1.001, MAX_LEN)
        yield num_seqs, int(num_seqs * context)
