"""The measured map of docs/map-h200.json as a GPU: what a step takes under each of its plans.

Between measured points times are interpolated. Beyond the last context a step grows by what
attention takes there, as measured at the largest batch that has longer contexts.
"""

import json
import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.engine.auto.planner import Planner
from nanovllm.engine.plan import GREEN, SEQUENTIAL, Plan
from tests.simulated_gpu import SILLY, calibrated_planner

BLOCK_SIZE = 256
SILLY_FACTOR = 5.0  # how many times as long as sequential decode it takes
RECORD = Path(__file__).resolve().parent.parent / "docs" / "map-h200.json"

Points = dict[int, list[tuple[int, float]]]  # by batch: context and seconds


@dataclass
class Point:
    """A measured point of the map: seconds by the name of the plan."""

    batch: int
    context: int
    seconds: dict[str, float]


class MeasuredShape:
    """One shape of the map.

    Attributes:
        plans: sequential, the silly one, and those of the map.
        timed: plan and seconds of the steps that calibrations have timed.
    """

    def __init__(self, record: dict[str, Any], seed: int = 0) -> None:
        self.name: str = record["name"]
        self.capacity = record["kv_blocks"] * BLOCK_SIZE
        self.max_len = record["options"]["max_model_len"]
        self.largest = record["options"]["max_num_seqs"]
        greens = [
            GREEN.with_sms((arm["lane_sms"]["attention"], arm["lane_sms"]["ffn"]))
            for arm in record["arms"]
            if arm["mode"] == "green"
        ]
        self.plans = [SEQUENTIAL, SILLY, *greens]
        self.points = []
        for point in record["points"]:
            medians = {n: arm["step_ms"]["median"] / 1e3 for n, arm in point["arms"].items()}
            medians.pop("auto", None)
            if point["reason"] is None:
                self.points.append(Point(point["batch"], point["context"], medians))
        self.noise = random.Random(seed)
        self.timed: list[tuple[Plan, float]] = []

    def seconds(self, plan: Plan, batch: int, tokens: int) -> float:
        """What a step takes: between batches at the same context."""
        if plan == SILLY:
            return SILLY_FACTOR * self.seconds(SEQUENTIAL, batch, tokens)
        known: Points = {}
        for point in self.points:
            if plan.name in point.seconds:
                known.setdefault(point.batch, []).append((point.context, point.seconds[plan.name]))
        batches = sorted(known)
        i = min(max(bisect_right(batches, batch), 1), len(batches) - 1)
        low, high = batches[i - 1], batches[i]
        share = (batch - low) / (high - low)
        at_low, at_high = (self._at(known, each, tokens / batch) for each in (low, high))
        return (1 - share) * at_low + share * at_high

    def _at(self, known: Points, batch: int, context: float) -> float:
        curve = sorted(known[batch])
        contexts = [each for each, _ in curve]
        if context > contexts[-1] or len(curve) == 1:
            return curve[-1][1] + per_token(known) * batch * (context - contexts[-1])
        i = min(max(bisect_right(contexts, context), 1), len(curve) - 1)
        (left, before), (right, after) = curve[i - 1 : i + 1]
        return before + (after - before) * (context - left) / (right - left)

    def timer(self, plan: int, batch: int, tokens: int) -> float:
        """As a `StepTimer`: 1% of noise."""
        seconds = self.seconds(self.plans[plan], batch, tokens)
        self.timed.append((self.plans[plan], seconds))
        return seconds * self.noise.gauss(1, 0.01)

    def planner(self) -> Planner:
        """A planner after a calibration."""
        given = self.largest, self.capacity, self.max_len
        return calibrated_planner(self.timer, self.plans, *given)


def per_token(known: Points) -> float:
    """Seconds by which a step grows with each token, between the longest contexts there are."""
    batch = max(batch for batch, curve in known.items() if len(curve) > 2)
    (left, before), (right, after) = sorted(known[batch])[-2:]
    return (after - before) / (right - left) / batch


def measured_shapes(seed: int = 0) -> Iterator[MeasuredShape]:
    for record in json.loads(RECORD.read_text(encoding="utf-8"))["shapes"]:
        yield MeasuredShape(record, seed)
