"""A GPU with plans to run steps by: what they cost, a calibration of that, and runs of steps."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from nanovllm.engine.auto.calibration import Calibration, StepTimer, pipelined_sizes
from nanovllm.engine.auto.planner import Planner
from nanovllm.engine.graph_memory import batch_sizes
from nanovllm.engine.plan import GREEN, SEQUENTIAL, STREAMS, Plan

SILLY = GREEN.with_sms((16, 16))
SPLITS = [GREEN.with_sms((attention, 132 - attention)) for attention in (28, 36, 44, 52, 60)]
PLANS = [SEQUENTIAL, STREAMS, SILLY, *SPLITS]
LARGEST = 1024


def calibrated_planner(
    timer: StepTimer, plans: list[Plan], largest: int, capacity: int, max_len: int
) -> Planner:
    """A planner after a calibration that nobody keeps."""
    cache: Any = SimpleNamespace(read=lambda key: None, write=lambda key, value: None)
    calibration = Calibration(timer, largest, capacity, max_len, {}, cache)
    sizes = calibration.run(plans, show_progress=False)
    sizes[0] = batch_sizes(largest)
    return Planner(calibration.table, plans, sizes)


@dataclass
class Gpu:
    """What steps take, in seconds.

    The dense work reads the weights or is bound by arithmetic; attention is bound by bandwidth,
    which rises with its SMs and levels off.

    Attributes:
        slower: by plan, how many times as slow it is in a run as it was calibrated.
        noise: standard deviation of a measured time, as a share.
    """

    weights: float = 3.5e-3
    per_seq: float = 14e-6
    bandwidth: float = 28e6
    sharpness: float = 8.0
    overlap: float = 1.08
    noise: float = 0.01
    random: random.Random = field(default_factory=lambda: random.Random(0))
    slower: dict[Plan, float] = field(default_factory=dict)

    def dense(self, batch: float) -> float:
        return math.hypot(self.weights, self.per_seq * batch)

    def seconds(self, plan: Plan, batch: int, tokens: int) -> float:
        if plan == SEQUENTIAL:
            return self.dense(batch) + tokens / self.bandwidth
        attention_sms, ffn_sms = (lane.sms or 132 for lane in plan.lanes)
        halves = 2 * self.dense(batch / 2) / min(ffn_sms / 110, 1)
        reading = tokens / self.bandwidth / (1 - math.exp(-attention_sms / 34))
        both = (halves**self.sharpness + reading**self.sharpness) ** (1 / self.sharpness)
        if plan == STREAMS:
            both = 0.6 * both + 0.4 * (halves + reading)
        return both * self.overlap * self.slower.get(plan, 1.0)

    def measured(self, seconds: float) -> float:
        return seconds * math.exp(self.random.gauss(0, self.noise))

    def planner(self) -> Planner:
        """After a calibration, which is as noisy as steps are."""

        def timer(plan: int, batch: int, tokens: int) -> float:
            return self.measured(self.seconds(PLANS[plan], batch, tokens))

        return calibrated_planner(timer, PLANS, LARGEST, capacity=4_000_000, max_len=8192)


@dataclass
class Run:
    """Steps that were run: the plan of each, and what they took together.

    Attributes:
        best, sequential: what they would have taken under the best plan of each, and sequentially.
    """

    plans: list[Plan] = field(default_factory=list)
    taken: float = 0.0
    best: float = 0.0
    sequential: float = 0.0


def drive(planner: Planner, gpu: Gpu, steps: Iterable[tuple[int, int]], dips: int = 0) -> Run:
    """Runs steps, given as (num_seqs, tokens); of every 400, so many seem 1.2 times as slow."""
    run = Run()
    for number, (num_seqs, tokens) in enumerate(steps):
        costs = {}
        for plan in PLANS:
            sizes = batch_sizes(LARGEST) if plan == SEQUENTIAL else pipelined_sizes(LARGEST)
            size = next(size for size in sizes if size >= num_seqs)
            costs[plan] = gpu.seconds(plan, size, tokens)
        choice = planner.choose(num_seqs, tokens)
        plan = PLANS[choice.plan]
        seconds = gpu.seconds(plan, choice.size, tokens)
        run.plans.append(plan)
        run.taken += seconds
        run.best += min(costs.values())
        run.sequential += costs[SEQUENTIAL]
        if choice.prediction is not None:
            dip = 1.2 if number % 400 < dips else 1.0
            planner.observe(choice.prediction, dip * gpu.measured(seconds))
    return run


def random_run(seed: int) -> Run:
    """2000 steps of a random GPU, on which one plan was calibrated far too well.

    Requests come and go, contexts grow, now and then all of it changes.
    """
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
    steps, num_seqs, context = [], 512, 512.0
    for step in range(2000):
        if step % 500 == 0:
            num_seqs, context = chance.choice([8, 128, 256, 512, 1024]), chance.uniform(64, 3000)
        num_seqs = min(max(num_seqs + chance.randint(-2, 2), 1), LARGEST)
        context = min(context * 1.001, 8192)
        steps.append((num_seqs, int(num_seqs * context)))
    return drive(planner, gpu, steps)
