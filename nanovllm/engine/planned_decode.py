"""Mode "auto": several ways to run a decode step stand ready, and a planner picks one each time.

The ways are sequential decode and pipelines on several splits of the SMs, each a `DecodeRunner` on
the same model, KV cache and graph memory. `prepare` asks the planner; whatever it picks has its
graph already, so that a switch costs nothing. How long a step took on the device, between two
events, goes back to the planner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.calibration import Calibration
from nanovllm.engine.cost_table import CostTable
from nanovllm.engine.decode_runner import DecodeRunner, DecodeStep
from nanovllm.engine.pipeline import Pipeline
from nanovllm.engine.planner import Choice, Plan, Planner

SEQUENTIAL = Plan("sequential")
# The FFN gets a group of whole multiples of this many SMs, about these shares of all of them.
FFN_MULTIPLE = 8
FFN_SHARES = (0.79, 0.72, 0.67, 0.61, 0.55)
Split = tuple[int, int]


@dataclass(frozen=True)
class PlannedStep(DecodeStep):
    """A step of one of the ways.

    Attributes:
        way: runs it.
        choice: the planner's.
        marks: timing events before and after it on the device, recorded by `run`; None where there
            is no prediction to compare with.
    """

    way: DecodeRunner
    choice: Choice
    marks: tuple[Any, Any] | None


class PlannedDecode:
    """The decode side of a `ModelRunner` in mode "auto"; see `DecodeRunner` for the methods.

    Args:
        ways: by plan; sequential is the first. They are closed with this.
        calibration: measures what the plans cost.
        make_event: makes a timing event; default: a CUDA event.
    """

    def __init__(
        self,
        ways: Mapping[Plan, DecodeRunner],
        calibration: Calibration,
        make_event: Callable[[], Any] | None = None,
    ) -> None:
        self.ways = dict(ways)
        self.calibration = calibration
        self.make_event = make_event or partial(torch.cuda.Event, enable_timing=True)
        self.planner = Planner(CostTable(), {SEQUENTIAL: self.sequential.graph_sizes})
        statistics = self.pipeline.statistics
        statistics.planner, statistics.mode = self.planner, "auto"
        # They are of all ways, so they name no single split.
        statistics.attention_sms = statistics.ffn_sms = statistics.device_sms = None

    @property
    def sequential(self) -> DecodeRunner:
        """The way that runs every step that is not calibrated."""
        return self.ways[SEQUENTIAL]

    @property
    def config(self) -> Config:
        return self.sequential.config

    @property
    def pipeline(self) -> Pipeline:
        """The sequential way's, whose statistics all ways share."""
        return self.sequential.pipeline

    def prepare(self, context_lens: np.ndarray) -> PlannedStep:
        """Chooses how a step of these sequences will run."""
        choice = self.planner.choose(len(context_lens), int(context_lens.sum()))
        way = self.ways[choice.plan]
        step = way.prepare_size(context_lens, choice.batch)
        marks = None if choice.seconds is None else (self.make_event(), self.make_event())
        return PlannedStep(step.layout, step.rows, way, choice, marks)

    def capture(self, *, show_progress: bool) -> None:
        """Captures sequential decode, then prepares the choice."""
        self.sequential.capture(show_progress=show_progress)
        self.calibrate(show_progress=show_progress)

    def calibrate(self, *, show_progress: bool) -> None:
        """Measures the plans, unless that is on disk, and captures those that can be worth it."""
        worthwhile = self.calibration.run(self.ways, show_progress=show_progress)
        sizes = {plan: sorted(worthwhile.get(plan, ())) for plan in self.ways}
        for plan, way in self.ways.items():
            if way is not self.sequential and sizes[plan]:
                way.capture(show_progress=show_progress, sizes=sizes[plan])
        sizes[SEQUENTIAL] = self.sequential.graph_sizes
        self.planner = Planner(self.calibration.table, sizes)
        self.pipeline.statistics.planner = self.planner

    def run(self, step: DecodeStep, flat: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Issues a step that `prepare` returned."""
        assert isinstance(step, PlannedStep)
        if step.marks is None:
            return step.way.run(step, flat, device)
        begin, end = step.marks
        begin.record()
        logits = step.way.run(step, flat, device)
        end.record()
        return logits

    def finish(self, step: DecodeStep, num_seqs: int) -> None:
        """Counts a step, which must be complete, and lets the planner learn from it."""
        assert isinstance(step, PlannedStep)
        step.way.finish(step, num_seqs)
        if step.marks is not None and step.way.marks is None:  # a profiled step takes longer
            begin, end = step.marks
            self.planner.observe(step.choice, begin.elapsed_time(end) * 1e-3)

    def close(self) -> None:
        """Frees graphs and partitions of all ways; may be called twice."""
        for way in self.ways.values():
            way.close()


def splits_to_try(device_sms: int) -> list[Split]:
    """SMs of attention and FFN that fill the device: of 132, from 28+104 to 60+72."""
    splits = [split_for(device_sms, share) for share in FFN_SHARES]
    return [split for split in dict.fromkeys(splits) if min(split) > 0]


def split_for(device_sms: int, ffn_share: float) -> Split:
    """SMs of attention and FFN that fill the device, about `ffn_share` of them for the FFN."""
    ffn = round(device_sms * ffn_share / FFN_MULTIPLE) * FFN_MULTIPLE
    return device_sms - ffn, ffn


def make_planned_decode(
    config: Config,
    configured: DecodeRunner,
    sequential: DecodeRunner,
    make_way: Callable[[Config], DecodeRunner],
    calibration: Calibration,
    splits: Iterable[Split],
) -> PlannedDecode:
    """Puts the ways of mode "auto" together; closes them all if that fails.

    Args:
        config: of the engine.
        configured: the pipeline on the SMs that `config` names; it did not fall back.
        sequential: runs sequential steps.
        make_way: makes a decode runner as a config says.
        calibration: see `PlannedDecode`.
        splits: SMs of attention and FFN of further pipelines.
    """
    ways = {SEQUENTIAL: sequential, plan_of(configured): configured}
    try:
        for attention, ffn in splits:
            way = make_way(
                dataclasses.replace(
                    config,
                    pipeline_mode="green",
                    pipeline_attention_sm_count=attention,
                    pipeline_ffn_sm_count=ffn,
                    pipeline_strict=False,
                )
            )
            if way.pipeline.scheduler is None or plan_of(way) in ways:
                way.close()  # a split that this device does not make, or makes twice
            else:
                ways[plan_of(way)] = way
        return PlannedDecode(ways, calibration)
    except BaseException:
        for way in ways.values():
            way.close()
        raise


def plan_of(way: DecodeRunner) -> Plan:
    """What a pipelined way was granted."""
    manager = way.pipeline.manager
    assert manager is not None
    return Plan("green", manager.attention_sms, manager.ffn_sms)


Decode = DecodeRunner | PlannedDecode
