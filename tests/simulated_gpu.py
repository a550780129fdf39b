"""A GPU with plans to run steps by: true costs, a calibration of them, noisy, drifting clocks.

`Gpu` knows what every plan really costs, `calibrate` measures it as an engine would, and `drive`
runs steps: the planner chooses, the GPU tells it the time. A run's regret is how much longer it
took than the best plan of every single step, known beforehand, would have.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from nanovllm.engine.cost_table import CostTable, next_sample
from nanovllm.engine.plan import GREEN, SEQUENTIAL, STREAMS, Plan
from nanovllm.engine.planner import Planner

GREENS = [GREEN.with_sms((attention, 132 - attention)) for attention in (24, 36, 48, 64)]
PLANS = [SEQUENTIAL, STREAMS, *GREENS]

LADDER = [1, 2, 4, 8, *range(16, 1025, 16)]
COARSE = [*range(64, 1025, 64)]
SIZES = {plan: LADDER if plan is SEQUENTIAL else COARSE for plan in PLANS}
CALIBRATED = [1, 8, 16, 64, 128, 256, 512, 1024]


@dataclass
class Gpu:
    """What steps take, in seconds.

    The dense work reads the weights or is bound by arithmetic; attention is bound by bandwidth,
    which rises with its SMs and levels off.

    Attributes:
        slower: by plan, how many times as slow it really is as calibrated.
        clocks: how many times as slow everything is.
        noise: standard deviation of a measured time, as a share.
        outliers: share of the steps that are measured as three times as long.
    """

    weights: float = 3.5e-3
    per_seq: float = 14e-6
    bandwidth: float = 28e6
    sharpness: float = 8.0
    overlap: float = 1.08
    slower: dict[Plan, float] = field(default_factory=dict)
    clocks: float = 1.0
    noise: float = 0.0
    outliers: float = 0.0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def dense(self, batch: float) -> float:
        return math.hypot(self.weights, self.per_seq * batch)

    def calibrated(self, plan: Plan, batch: int, tokens: int) -> float:
        """What a step took during calibration."""
        if plan.mode == "sequential":
            return self.dense(batch) + tokens / self.bandwidth
        ffn, attention = 1.0, 1.0
        attention_sms, ffn_sms = (lane.sms for lane in plan.lanes)
        if attention_sms is not None and ffn_sms is not None:
            ffn = ffn_sms / 110
            attention = 1 - math.exp(-attention_sms / 34)
        halves = 2 * self.dense(batch / 2) / min(ffn, 1)
        reading = tokens / self.bandwidth / attention
        both = (halves**self.sharpness + reading**self.sharpness) ** (1 / self.sharpness)
        if plan.mode == "streams":
            both = 0.6 * both + 0.4 * (halves + reading)
        return both * self.overlap

    def true(self, plan: Plan, batch: int, tokens: int) -> float:
        """What a step takes now."""
        return self.calibrated(plan, batch, tokens) * self.slower.get(plan, 1.0) * self.clocks

    def measured(self, true: float) -> float:
        """The time that is seen of a step that took so long."""
        pause = 3.0 if self.random.random() < self.outliers else 1.0
        return true * pause * math.exp(self.random.gauss(0, self.noise))


def calibrate(gpu: Gpu, error: Callable[[], float] = lambda: 1.0) -> CostTable:
    """A table of the GPU, each sample off by what `error` draws."""
    table = CostTable()
    for plan, sizes in SIZES.items():
        for batch in set(CALIBRATED) & set(sizes):
            samples: list[tuple[int, float]] = []
            while (tokens := next_sample(samples, batch, batch * 8192)) is not None:
                samples.append((tokens, gpu.calibrated(plan, batch, tokens) * error()))
            table.add(plan.name, batch, samples)
    return table


def padded(plan: Plan, num_seqs: int) -> int | None:
    return next((size for size in SIZES[plan] if size >= num_seqs), None)


def true_costs(gpu: Gpu, num_seqs: int, tokens: int) -> dict[Plan, float]:
    """What the step would take under every plan that has a graph for it."""
    sizes = {plan: padded(plan, num_seqs) for plan in PLANS}
    return {p: gpu.true(p, size, tokens) for p, size in sizes.items() if size is not None}


@dataclass
class Run:
    """Steps that were run: the plan of each, what it took, and what all plans would have."""

    plans: list[Plan] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    costs: list[dict[Plan, float]] = field(default_factory=list)

    @property
    def switches(self) -> int:
        return sum(a != b for a, b in zip(self.plans, self.plans[1:], strict=False))

    def regret(self, start: int = 0) -> float:
        """How much longer the steps took than the best of each, as a share."""
        best = sum(min(costs.values()) for costs in self.costs[start:])
        return sum(self.taken[start:]) / best - 1

    def best_fixed(self) -> float:
        """What the steps would have taken under the best plan for the whole run."""
        everywhere = set.intersection(*(set(costs) for costs in self.costs))
        return min(sum(costs[plan] for costs in self.costs) for plan in everywhere)


def drive(planner: Planner, gpu: Gpu, steps: Iterable[tuple[int, int]]) -> Run:
    """Runs steps, given as (num_seqs, tokens)."""
    run = Run()
    for num_seqs, tokens in steps:
        choice = planner.choose(num_seqs, tokens)
        assert choice.batch == padded(choice.plan, num_seqs)
        run.plans.append(choice.plan)
        run.costs.append(true_costs(gpu, num_seqs, tokens))
        run.taken.append(run.costs[-1][choice.plan])
        planner.observe(choice, gpu.measured(run.taken[-1]))
    return run


def crossover(gpu: Gpu, batch: int) -> int:
    """The fewest tokens at which sequential is no longer the best plan."""
    return next(
        tokens
        for tokens in range(batch * 16, batch * 8192, batch)
        if min(costs := true_costs(gpu, batch, tokens), key=costs.__getitem__) is not SEQUENTIAL
    )


def random_run(seed: int) -> Run:
    """A run of a random GPU, calibrated with noise, where one plan was calibrated far too well."""
    chance = random.Random(seed)
    gpu = Gpu(
        weights=chance.uniform(0.5e-3, 6e-3),
        per_seq=chance.uniform(2e-6, 30e-6),
        bandwidth=chance.uniform(10e6, 100e6),
        sharpness=chance.uniform(4, 30),
        overlap=chance.uniform(1.0, 1.2),
        noise=chance.uniform(0, 0.02),
        outliers=chance.uniform(0, 0.01),
        random=chance,
    )
    table = calibrate(gpu, lambda: math.exp(chance.gauss(0, 0.005)))
    gpu.slower = {plan: chance.uniform(0.98, 1.02) for plan in PLANS}
    gpu.slower[chance.choice(GREENS)] = chance.uniform(1, 1.3)
    return drive(Planner(table, SIZES), gpu, workload(gpu, chance))


def workload(gpu: Gpu, chance: random.Random) -> Iterable[tuple[int, int]]:
    """2000 steps: requests come and go, contexts grow, now and then all of it changes."""
    num_seqs, context = 512, 512.0
    for step in range(2000):
        if step % 500 == 0:
            num_seqs, context = chance.choice([8, 64, 256, 512, 1024]), chance.uniform(64, 6000)
            gpu.clocks = chance.uniform(0.9, 1.1)
        num_seqs = min(max(num_seqs + chance.randint(-2, 2), 1), 1024)
        context = min(context * 1.001, 8000)
        yield num_seqs, int(num_seqs * context)
