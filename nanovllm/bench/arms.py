"""The pipeline modes beside each other, on the weights and the KV cache of one engine.

    specs = [ArmSpec("sequential"), ArmSpec("green", split=(36, 96))]
    with open_arms(engine, specs) as arms:
        arms[1].activate()
        engine.step()

An arm that falls back would only measure sequential decode again; it says why instead. To measure
just that, what falling back costs, there is the arm "fallback": a pipeline on more SMs than there
are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nanovllm.bench import BenchError
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pipeline import MIN_DENSE_SMS
from nanovllm.engine.plan import LANES3
from nanovllm.engine.planned_decode import AutoPlan, Split, split_for
from nanovllm.engine.step_runner import StepRunner

SEQUENTIAL, GREEN, AUTO, FALLBACK = "sequential", "green", "auto", "fallback"
QKV_LANE = LANES3.mode
# The FFN's part of all SMs where nothing is said.
FFN_SHARE = 0.72


@dataclasses.dataclass(frozen=True)
class ArmSpec:
    """What an arm is to be.

    Attributes:
        mode: a value of `Config.pipeline_mode`, or "fallback".
        split: SMs of attention and FFN to ask for; None: the defaults of `Config`.
        name: its name, where that is not the mode.
    """

    mode: str
    split: Split | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """Its name in tables and records; no two arms may have the same."""
        return self.name or self.mode


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to run decode steps.

    Attributes:
        spec: as asked for.
        runner: the engine's.
        step_runner: runs the steps.
    """

    spec: ArmSpec
    runner: ModelRunner
    step_runner: StepRunner

    @property
    def mode(self) -> str:
        return self.spec.mode

    @property
    def label(self) -> str:
        return self.spec.label

    @property
    def plan(self) -> str | None:
        """The plan in use, where a planner chooses one; None before its first step."""
        return self._planner().get("plan")

    @property
    def plan_steps(self) -> dict[str, int]:
        """Steps so far by plan, where a planner chooses one; else empty."""
        plans = self._planner().get("plans", {})
        return {name: record["steps"] for name, record in plans.items()}

    def _planner(self) -> dict[str, Any]:
        planner = self.step_runner.statistics.as_dict().get("planner")
        return planner if isinstance(planner, dict) else {}

    def activate(self) -> None:
        """Makes the engine's next decode steps run this way; none may be under way."""
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
        self.runner.step_runner = self.step_runner

    def fallback_reason(self, batch: int) -> str | None:
        """Why steps of `batch` sequences do not run as asked for; None if they do."""
        if self.mode in (SEQUENTIAL, FALLBACK):
            return None
        if self.step_runner.statistics.fallback_reason is not None:
            return self.step_runner.statistics.fallback_reason
        fewest = self.step_runner.schedulers[-1].plan.micro_batches
        if self.mode != AUTO and batch < fewest:
            return f"a batch of {batch} is too small for {fewest} micro-batches"
        return None


def choose_split(device_sms: int, attention: int | None, ffn: int | None) -> Split | None:
    """SMs to ask for; where nothing is given, what fills the device. None: leave it as it is.

    Raises:
        BenchError: one stage takes all SMs.
    """
    if not device_sms:
        return None
    if ffn is None:
        ffn = split_for(device_sms, FFN_SHARE)[1] if attention is None else device_sms - attention
    if attention is None:
        attention = device_sms - ffn
    if attention < 1 or ffn < 1:
        raise BenchError(f"one stage leaves none of the device's {device_sms} SMs for the other")
    return attention, ffn


def arm_specs(modes: Sequence[str], splits: Sequence[Split], other: Split | None) -> list[ArmSpec]:
    """One arm a mode, but green with each of `splits`; sequential is always the first.

    Args:
        modes: values of `Config.pipeline_mode`, or "fallback".
        splits: of the green arms; none: there is one green arm like the others.
        other: split of all other arms.
    """
    specs: list[ArmSpec] = []
    for mode in dict.fromkeys((SEQUENTIAL, *modes)):
        if mode == GREEN and splits:
            specs += [ArmSpec(mode, split, green_label(split)) for split in dict.fromkeys(splits)]
        else:
            specs.append(ArmSpec(mode, other))
    return specs


def green_label(split: Split) -> str:
    return f"{GREEN} {split[0]}+{split[1]}"


@contextmanager
def open_arms(engine: LLMEngine, specs: Sequence[ArmSpec]) -> Iterator[list[Arm]]:
    """The arms, and afterwards the engine as it was.

    Args:
        engine: its own way must be sequential; it serves as that arm.
        specs: one for each arm.
    """
    runner = engine.model_runner
    own = runner.step_runner
    arms: list[Arm] = []
    try:
        for spec in specs:
            steps = own if spec.mode == SEQUENTIAL else make_step_runner(runner, spec)
            arms.append(Arm(spec, runner, steps))
            if isinstance(steps.chooser, AutoPlan):
                steps.chooser.calibrate(steps, show_progress=True)
        yield arms
    finally:
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        runner.step_runner = own
        for arm in arms:
            if arm.step_runner is not own:
                arm.step_runner.close()


def make_step_runner(runner: ModelRunner, spec: ArmSpec) -> StepRunner:
    """The pipeline that `spec` asks for, or what the engine falls back to."""
    config = dataclasses.replace(runner.config, enable_pipeline=True)
    if spec.mode == FALLBACK:
        config.pipeline_attention_sm_count = runner.device_sms + 1
        return runner.make_step_runner(config)
    if spec.mode == QKV_LANE:
        attention, ffn = spec.split or (1, MIN_DENSE_SMS + 1)
        sms = attention, ffn - MIN_DENSE_SMS, MIN_DENSE_SMS
        return runner.make_step_runner(config, LANES3.with_sms(sms))
    config.pipeline_mode = spec.mode
    if spec.split is not None:
        config.pipeline_attention_sm_count, config.pipeline_ffn_sm_count = spec.split
    return runner.make_step_runner(config)
