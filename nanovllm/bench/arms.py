"""The arms of a comparison: pipeline modes beside each other, on one engine's weights and KV cache.

    specs = [ArmSpec("sequential"), ArmSpec("green", (36, 96))]
    with open_arms(engine, specs) as arms:
        arms[1].activate()
        engine.step()

An arm that falls back is not timed, as that would be sequential decode once more; its record says
why it fell back. What falling back costs is measured by the arm "fallback", a pipeline on more SMs
than there are.

With several ranks the engine itself is made with the one mode that is compared to sequential, since
the ranks' plans have to be the same.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from nanovllm.bench import BenchError
from nanovllm.engine import plan as plans
from nanovllm.engine.auto.auto_plan import AutoPlan, Split, split_for, splits_to_try
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.pipeline_modes import MIN_DENSE_SMS
from nanovllm.engine.step_runner import FixedPlan, StepRunner
from nanovllm.utils.device import sm_count

SEQUENTIAL, GREEN, AUTO, FALLBACK = "sequential", "green", "auto", "fallback"
LANES3 = plans.LANES3.mode
# The FFN's part of all SMs where nothing is said.
FFN_SHARE = 0.72


@dataclasses.dataclass(frozen=True)
class ArmSpec:
    """What an arm is to be."""

    mode: str  # a value of `Config.pipeline_mode`, "lanes3" or "fallback"
    split: Split | None = None  # SMs of attention and FFN; None: the defaults of `Config`
    label: str = ""  # its name in tables and records; default: the mode

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.mode)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to run decode steps: a step runner of the engine, and who chooses its plans."""

    label: str
    mode: str
    runner: ModelRunner
    step_runner: StepRunner
    chooser: FixedPlan

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

    def describe(self, batch: int | None = None) -> dict[str, Any]:
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
        raise BenchError(
            f"--attention-sms or --ffn-sms leaves none of the device's {device_sms} SMs for the "
            "other"
        )
    return attention, ffn


def specs_of(args: argparse.Namespace) -> list[ArmSpec]:
    """The arms that the command line asks for; several splits only where it has --splits."""
    device_sms = sm_count(args.device)
    other = choose_split(device_sms, args.attention_sms, args.ffn_sms)
    splits = [] if args.workload == "decode" else args.splits or splits_to_try(device_sms)
    specs = arm_specs(args.modes, splits, other)
    rank_options(specs, args.tensor_parallel_size)
    return specs


def arm_specs(modes: Sequence[str], splits: Sequence[Split], other: Split | None) -> list[ArmSpec]:
    """One arm a mode, but green with each of `splits`, if any; sequential is always the first."""
    specs: list[ArmSpec] = []
    for mode in dict.fromkeys((SEQUENTIAL, *modes)):
        if mode == GREEN and splits:
            specs += [ArmSpec(mode, s, f"{GREEN} {s[0]}+{s[1]}") for s in dict.fromkeys(splits)]
        else:
            specs.append(ArmSpec(mode, other))
    return specs


def pipeline_options(mode: str, split: Split | None) -> dict[str, Any]:
    """Fields of `Config` for a mode and its SMs."""
    options: dict[str, Any] = {"enable_pipeline": mode != SEQUENTIAL, "pipeline_mode": mode}
    if split is not None:
        options["pipeline_attention_sm_count"], options["pipeline_ffn_sm_count"] = split
    return options if mode != SEQUENTIAL else {}


def rank_options(specs: Sequence[ArmSpec], ranks: int) -> dict[str, Any]:
    """Fields of `Config` that give several ranks the plans of all arms; none for one rank."""
    others = [spec for spec in specs if spec.mode != SEQUENTIAL]
    if ranks == 1 or not others:
        return {}
    if len(others) > 1 or others[0].mode in (LANES3, FALLBACK):
        raise BenchError(
            f"--tensor-parallel-size {ranks} allows one of microbatch, streams, green and auto "
            f"beside sequential, not {', '.join(spec.label for spec in others)}"
        )
    return pipeline_options(others[0].mode, others[0].split)


@contextmanager
def open_arms(engine: LLMEngine, specs: Sequence[ArmSpec]) -> Iterator[list[Arm]]:
    """The arms, and afterwards the engine as it was: without a pipeline, or with `rank_options`."""
    runner = engine.model_runner
    own, chooser = runner.step_runner, runner.step_runner.chooser
    with ExitStack() as made:
        try:
            arms: list[Arm] = []
            for spec in specs:
                steps, chooses = own, chooser
                if spec.mode == SEQUENTIAL:
                    chooses = FixedPlan(own.schedulers[:1], own.memory)
                elif engine.config.tensor_parallel_size == 1:
                    steps = made.enter_context(closing(make_step_runner(runner, spec)))
                    chooses = steps.chooser
                    if isinstance(chooses, AutoPlan):
                        chooses.calibrate(steps, show_progress=True)
                arms.append(Arm(spec.label, spec.mode, runner, steps, chooses))
            yield arms
        finally:
            runner.use(own, chooser)


def make_step_runner(runner: ModelRunner, spec: ArmSpec) -> StepRunner:
    """The pipeline that `spec` asks for, or what the engine falls back to."""
    if spec.mode == LANES3:
        config = dataclasses.replace(runner.config, enable_pipeline=True)
        attention, ffn = spec.split or (1, MIN_DENSE_SMS + 1)
        sms = attention, ffn - MIN_DENSE_SMS, MIN_DENSE_SMS
        return runner.make_step_runner(config, plans.LANES3.with_sms(sms))
    if spec.mode == FALLBACK:
        options = pipeline_options(AUTO, (runner.device_sms + 1, 1))
    else:
        options = pipeline_options(spec.mode, spec.split)
    return runner.make_step_runner(dataclasses.replace(runner.config, **options))
