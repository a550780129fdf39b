"""The arms of a comparison: pipeline modes beside each other, on one engine's weights and KV cache.

An arm that falls back is not timed, as that would be sequential decode once more; its record says
why it fell back. What falling back costs is measured by the arm "fallback", a pipeline on more SMs
than there are.

Several ranks need the same plans, so there the engine itself is made with the one mode that is
compared to sequential.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from typing import Any

from nanovllm.bench import BenchError
from nanovllm.bench.report import Record
from nanovllm.engine import plan as plans
from nanovllm.engine.auto.chooser import AutoChooser, Split, split_for, splits_to_try
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pipeline_modes import MIN_FFN_SMS
from nanovllm.engine.step_runner import FixedChooser, StepRunner
from nanovllm.utils.device import sm_count

SEQUENTIAL, MICROBATCH, GREEN, AUTO = "sequential", "microbatch", "green", "auto"
LANES3, FALLBACK = plans.LANES3.mode, "fallback"
# The FFN's part of all SMs where nothing is said.
FFN_SHARE = 0.72

# What arms are to be, by their labels in tables and records: a value of `Config.pipeline_mode`,
# "lanes3" or "fallback", and the SMs of attention and FFN; None: the defaults of `Config`.
Specs = dict[str, tuple[str, Split | None]]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to run decode steps: a step runner of the engine, and who chooses its plans."""

    label: str
    mode: str
    runner: ModelRunner
    step_runner: StepRunner
    chooser: FixedChooser

    @property
    def plan(self) -> str | None:
        """The plan in use, where a planner chooses one; None before its first step."""
        planner: Any = self.step_runner.statistics.planner
        return None if planner is None else planner.as_dict()["plan"]

    def activate(self) -> None:
        """Makes the engine's next decode steps run this way; none may be under way."""
        self.runner.use(self.step_runner, self.chooser)

    def fallback_reason(self, batch: int | None = None) -> str | None:
        """Why steps of `batch` sequences, or all, do not run as asked for; None if they do."""
        if self.mode in (SEQUENTIAL, FALLBACK):
            return None
        if self.step_runner.statistics.fallback_reason is not None:
            return self.step_runner.statistics.fallback_reason
        fewest = self.step_runner.schedulers[-1].plan.micro_batches
        if self.mode != AUTO and batch is not None and batch < fewest:
            return f"a batch of {batch} is too small for {fewest} micro-batches"
        return None

    def describe(self, batch: int | None = None) -> Record:
        """The record of the arm: what it was to be, and the SMs that it was granted."""
        granted = {} if self.mode == SEQUENTIAL else self.step_runner.statistics.lane_sms
        return {
            "label": self.label,
            "mode": self.mode,
            "lane_sms": dict(granted),
            "fallback_reason": self.fallback_reason(batch),
        }


def choose_split(device_sms: int, attention: int | None, ffn: int | None) -> Split | None:
    """SMs to ask for; where nothing is given, what fills the device. None: there are no SMs."""
    if not device_sms:
        return None
    if ffn is None:
        ffn = split_for(device_sms, FFN_SHARE)[1] if attention is None else device_sms - attention
    if attention is None:
        attention = device_sms - ffn
    if attention < 1 or ffn < 1:
        raise BenchError(f"one lane is given all of the device's {device_sms} SMs, or more")
    return attention, ffn


def arm_specs(args: argparse.Namespace) -> Specs:
    """One arm a mode, sequential first; green has one for each split where there are --splits.

    Several ranks have one beside sequential, the first.
    """
    device_sms = sm_count(args.device)
    split = choose_split(device_sms, args.attention_sms, args.ffn_sms)
    splits = args.splits or splits_to_try(device_sms) if "splits" in args else []
    specs: Specs = {}
    for mode in (SEQUENTIAL, *args.modes):
        if mode == GREEN and splits:
            specs |= {f"{GREEN} {own[0]}+{own[1]}": (GREEN, own) for own in splits}
        else:
            specs[mode] = mode, split
    return dict(islice(specs.items(), 2 if args.tensor_parallel_size > 1 else None))


def pipeline_options(mode: str, split: Split | None) -> dict[str, Any]:
    """Fields of `Config` for a mode and its SMs."""
    if mode == SEQUENTIAL:
        return {}
    options: dict[str, Any] = {"enable_pipeline": True, "pipeline_mode": mode}
    if split is not None:
        options["pipeline_attention_sm_count"], options["pipeline_ffn_sm_count"] = split
    return options


@contextmanager
def open_arms(engine: LLMEngine, specs: Specs) -> Iterator[list[Arm]]:
    """The arms, and afterwards the engine as it was."""
    runner = engine.model_runner
    own, chooser = runner.step_runner, runner.step_runner.chooser
    with ExitStack() as made:
        try:
            arms: list[Arm] = []
            for label, (mode, split) in specs.items():
                steps, chooses = own, chooser
                if mode == SEQUENTIAL:
                    chooses = FixedChooser(own.schedulers[:1], own.memory)
                elif engine.config.tensor_parallel_size == 1:
                    steps = made.enter_context(closing(make_step_runner(runner, mode, split)))
                    chooses = steps.chooser
                    if isinstance(chooses, AutoChooser):
                        chooses.calibrate(steps, show_progress=True)
                arms.append(Arm(label, mode, runner, steps, chooses))
            yield arms
        finally:
            runner.use(own, chooser)


def make_step_runner(runner: ModelRunner, mode: str, split: Split | None) -> StepRunner:
    """The pipeline that is asked for, or what the engine falls back to."""
    if mode == LANES3:
        config = dataclasses.replace(runner.config, enable_pipeline=True)
        attention, ffn = split or (1, MIN_FFN_SMS + 1)
        sms = attention, ffn - MIN_FFN_SMS, MIN_FFN_SMS
        return runner.make_step_runner(config, plans.LANES3.with_sms(sms))
    if mode == FALLBACK:
        mode, split = AUTO, (runner.device_sms + 1, 1)
    options = pipeline_options(mode, split)
    return runner.make_step_runner(dataclasses.replace(runner.config, **options))


def timed_arms(arms: Iterable[Arm], batch: int) -> list[Arm]:
    """Those that run steps of `batch` sequences as asked for."""
    return [arm for arm in arms if arm.fallback_reason(batch) is None]


def plan_of_auto(arms: Iterable[Arm]) -> str | None:
    """The plan that auto has in use, if it is among the arms and has a planner."""
    return next((arm.plan for arm in arms if arm.mode == AUTO), None)
