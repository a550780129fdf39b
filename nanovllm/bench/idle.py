"""When the device works on the steps of an engine, and for how long it waits between two of them.

    with StepMeter(engine.model_runner) as meter:
        engine.generate(prompts)
    totals = meter.totals()  # .prefill_seconds, .decode_seconds, .gpu_idle_share

Every step is put between two marks, timing events on the stream that the runner issues it to: one
before the model, one after its tokens have been copied to the host. Nobody waits for them until
`totals`. On the CPU, where a step is done when it has been issued, the clock serves instead.

A mark before a step is not quite where its work begins. If the device has run dry, the mark happens
at once, and the graph behind it only after the host has launched it, which takes long for a graph
of hundreds of kernels. So wherever the step before had ended by the time a graph was launched, all
of the launch counts as idle: rather a little too much, where the device ran dry during the launch,
than too little.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

from nanovllm.engine.model_runner import LaunchedStep, ModelRunner
from nanovllm.engine.scheduler import Step
from nanovllm.engine.step_runner import PreparedStep


class Mark(Protocol):
    """A point in time on a device, as `torch.cuda.Event` is."""

    def record(self) -> None: ...
    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end_event: Any, /) -> float: ...


class ClockMark:
    """A mark for work that is done when the call returns."""

    def __init__(self) -> None:
        self.moment = 0.0

    def record(self) -> None:
        self.moment = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: ClockMark, /) -> float:
        """Milliseconds from this mark to another one."""
        return (end_event.moment - self.moment) * 1e3


@dataclass(frozen=True)
class MarkedStep:
    """A step that has been issued.

    Attributes:
        is_decode: whether it is decode or prefill.
        begin, end: the marks around its work.
        launch_seconds: after `begin`, in which the device had nothing to do yet.
        seconds: of its work.
    """

    is_decode: bool
    begin: Mark
    end: Mark
    launch_seconds: float

    @property
    def seconds(self) -> float:
        return self.begin.elapsed_time(self.end) * 1e-3 - self.launch_seconds

    def idle_before(self, other: MarkedStep) -> float:
        """Seconds from the end of this step's work to the beginning of a later one's."""
        return self.end.elapsed_time(other.begin) * 1e-3 + other.launch_seconds


@dataclass(frozen=True)
class StepTotals:
    """Sums over the steps of a run.

    Attributes:
        prefill_seconds, decode_seconds: of work on the device.
        gpu_idle_share: of the time from the first to the last of decode steps with no prefill
            between them, the share in which the GPU had nothing to do; None on the CPU, and without
            such steps.
        gpu_idle_gaps: how many times one decode step followed another.
    """

    prefill_seconds: float
    decode_seconds: float
    gpu_idle_share: float | None
    gpu_idle_gaps: int

    @classmethod
    def of(cls, steps: list[MarkedStep], *, on_gpu: bool) -> StepTotals:
        """The sums; all steps must be complete."""
        pairs = [(a, b) for a, b in pairwise(steps) if a.is_decode and b.is_decode]
        idle = sum(a.idle_before(b) for a, b in pairs)
        total = idle + sum(a.seconds for a, _ in pairs)
        return cls(
            sum(step.seconds for step in steps if not step.is_decode),
            sum(step.seconds for step in steps if step.is_decode),
            idle / total if on_gpu and total else None,
            len(pairs),
        )


class StepMeter:
    """Marks all steps that a runner issues while its `with` block runs.

    Args:
        runner: of an engine with one rank; its methods are wrapped meanwhile.
        make_mark: makes a mark; default: what suits the runner's device.
    """

    def __init__(self, runner: ModelRunner, make_mark: Callable[[], Mark] | None = None) -> None:
        self.on_gpu = runner.device.type == "cuda"
        self._runner = runner
        self._make_mark = make_mark or (make_event if self.on_gpu else ClockMark)
        self._captured = runner.graph_memory is not None
        self._steps: list[MarkedStep] = []
        self._begin: Mark | None = None
        self._launch_seconds = 0.0

    def __enter__(self) -> StepMeter:
        # Looked up before the names of the instance hide those of the class.
        self._steps_of = self._runner.step_runner
        vars(self._steps_of)["run"] = self._wrap_run(self._steps_of.run)
        vars(self._runner)["launch"] = self._wrap_launch(self._runner.launch)
        return self

    def __exit__(self, *exc_info: object) -> None:
        del vars(self._steps_of)["run"], vars(self._runner)["launch"]

    def totals(self) -> StepTotals:
        """Sums over all steps so far; waits for the last one."""
        if self._steps:
            self._steps[-1].end.synchronize()
        return StepTotals.of(self._steps, on_gpu=self.on_gpu)

    def _wrap_run(self, run: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def marked(step: PreparedStep, *args: Any) -> torch.Tensor:
            if args:  # a capture
                return run(step, *args)
            self._begin = self._mark()
            start = time.perf_counter()
            logits = run(step)
            seconds = time.perf_counter() - start
            graph = self._captured and step.layout.is_decode
            ran_dry = graph and bool(self._steps) and self._steps[-1].end.query()
            self._launch_seconds = seconds if ran_dry else 0.0
            return logits

        return marked

    def _wrap_launch(
        self, launch: Callable[[Step], LaunchedStep]
    ) -> Callable[[Step], LaunchedStep]:
        def marked(step: Step) -> LaunchedStep:
            launched = launch(step)
            assert self._begin is not None
            self._steps.append(
                MarkedStep(step.is_decode, self._begin, self._mark(), self._launch_seconds)
            )
            return launched

        return marked

    def _mark(self) -> Mark:
        mark = self._make_mark()
        mark.record()
        return mark


def make_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
