"""Plans and orders: how a step is issued, as data.

A plan says how many micro-batches a step has and which lane runs which stages; its order is a list
of `Work`, a walk through all stages of all micro-batches. Lanes work in order, so the order decides
what overlaps. Every rank makes the same plans and orders, so a step names its plan by a number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from nanovllm.models.stage import Stage

# The stage that reads the KV cache. Its scratch memory is made for the SMs of its lane.
ATTENTION = "attention"
# Everything before and after a step: the stream of the caller.
MAIN = "main"


@dataclass(frozen=True)
class PlannedLane:
    """A lane of a plan."""

    name: str
    stages: tuple[str, ...] = ()  # names of those it runs; none: those that no other lane names
    sms: int | None = None  # of its partition, if it has one


@dataclass(frozen=True)
class Plan:
    """How a step is issued."""

    mode: str  # a value of `Config.pipeline_mode`, or one of the benchmarks' own
    micro_batches: int  # a step with fewer sequences is issued by another plan
    lanes: tuple[PlannedLane, ...]  # at most one of them names no stages
    streams: bool = False  # whether each lane has a stream; else all work goes to the caller's

    @cached_property
    def name(self) -> str:
        """What tells it from other plans, such as "green 36+96"."""
        sms = [str(lane.sms) for lane in self.lanes if lane.sms is not None]
        return f"{self.mode} {'+'.join(sms)}" if sms else self.mode

    def lane_of(self, stage: str) -> PlannedLane:
        """The lane that runs the stages of that name; ValueError if there is none."""
        named = [lane for lane in self.lanes if stage in lane.stages]
        others = [lane for lane in self.lanes if not lane.stages]
        if not named + others:
            raise ValueError(f"stage={stage!r} has no lane in plan {self.name!r}")
        return (named + others)[0]

    def with_sms(self, sms: Sequence[int]) -> Plan:
        """The same on partitions of these sizes."""
        lanes = zip(self.lanes, sms, strict=True)
        return replace(self, lanes=tuple(replace(lane, sms=count) for lane, count in lanes))


TWO_LANES = (PlannedLane("attention", (ATTENTION,)), PlannedLane("ffn"))
SEQUENTIAL = Plan("sequential", 1, TWO_LANES)
SEQUENTIAL_NUMBER = 0  # its place among the plans of every engine
MICROBATCH = Plan("microbatch", 2, TWO_LANES)
STREAMS = Plan("streams", 2, TWO_LANES, streams=True)
GREEN = Plan("green", 2, TWO_LANES, streams=True)
# Of the benchmark alone: QKV leaves the FFN lane, so three micro-batches are under way.
LANES3 = Plan("lanes3", 3, (*TWO_LANES, PlannedLane("qkv", ("qkv",))), streams=True)


class Choice(NamedTuple):
    """How a decode step runs."""

    plan: int  # its number
    size: int  # rows, with padding
    prediction: Any = None  # if there is one, the step's time is told to the chooser, with it


@dataclass(frozen=True)
class Work:
    """Neighbouring stages of one micro-batch on one lane."""

    lane: str
    micro_batch: int
    stages: tuple[Stage, ...] = ()  # in order; none on the main lane, which only waits
    waits: bool = False  # whether the lane first waits for the micro-batch's last work
    records: bool = False  # whether somebody waits for the end of this work


def make_order(stages: Iterable[Stage], plan: Plan, micro_batches: int) -> list[Work]:
    """The works of a step of so many micro-batches: stage by stage, each of all micro-batches."""
    chain = merge(stages, plan)
    works = [Work(lane, batch, group) for lane, group in chain for batch in range(micro_batches)]
    return with_events(works)


def merge(stages: Iterable[Stage], plan: Plan) -> list[tuple[str, tuple[Stage, ...]]]:
    """The stages a micro-batch runs through, neighbours on one lane together, and their lanes."""
    by_lane = groupby(stages, lambda stage: plan.lane_of(stage.name).name)
    return [(lane, tuple(group)) for lane, group in by_lane]


def with_events(works: Iterable[Work]) -> list[Work]:
    """Adds the waits that `works` need and no others, those of the main lane at the end among them.

    A work needs what its micro-batch's last work made, the first one the inputs, which come from
    the main lane; at the end that lane needs every micro-batch. Works of one lane need no event,
    and neither does what an earlier wait implies: a lane that has waited for an event knows all
    that the other lane knew when it recorded it.
    """
    order: list[Work] = []
    known: dict[str, Mapping[str, int]] = {MAIN: {MAIN: 0}}  # by lane, the last work known of each
    # Behind each micro-batch's last work: its number in the order, its lane, what that lane knew.
    last: dict[int, tuple[int, str, Mapping[str, int]]] = {}
    works = list(works)
    ends = [Work(MAIN, batch) for batch in dict.fromkeys(work.micro_batch for work in works[::-1])]
    for work in [*works, *ends]:
        number, lane, facts = last.get(work.micro_batch, (0, MAIN, known[MAIN]))
        knows = known.get(work.lane, {})
        waits = knows.get(lane, -1) < facts[lane]
        if waits:
            knows = {k: max(knows.get(k, -1), facts.get(k, -1)) for k in {*knows, *facts}}
            if work.micro_batch in last:
                order[number] = replace(order[number], records=True)
        known[work.lane] = {**knows, work.lane: len(order) + 1}
        last[work.micro_batch] = len(order), work.lane, known[work.lane]
        if work.stages or waits:
            order.append(replace(work, waits=waits))
    return order
