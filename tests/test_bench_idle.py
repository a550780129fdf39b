"""The meter of idle time, on a simulated device whose idle time is known; and on a CPU engine.

Run with `pytest tests/test_bench_idle.py`; it takes some seconds.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.bench import idle
from nanovllm.bench.idle import StepMeter

PREFILL, DECODE = False, True


class Device:
    """A clock of the host, and a stream: work and marks in order, never before they are issued."""

    def __init__(self) -> None:
        self.now = 0.0  # of the host
        self.free = 0.0  # when the stream has done all that was issued
        self.idle = 0.0  # of the stream, between two pieces of work

    def work(self, seconds: float) -> None:
        self.idle += max(self.now - self.free, 0.0)
        self.free = max(self.now, self.free) + seconds

    def mark(self) -> Any:
        return Mark(self)


class Mark:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.moment = float("inf")

    def record(self) -> None:
        self.moment = max(self.device.now, self.device.free)

    def query(self) -> bool:
        return self.moment <= self.device.now

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.moment)

    def elapsed_time(self, end_event: Mark) -> float:
        return (end_event.moment - self.moment) * 1e3


class Runner:
    """As a `ModelRunner` on that device: launching takes the host a while, then work is there."""

    def __init__(self, device: Device, *, captured: bool = True) -> None:
        self.clock = device
        self.device = torch.device("cuda")
        self.graph_memory = object() if captured else None
        self.launch_seconds = self.work_seconds = 0.0

    @property
    def step_runner(self) -> Runner:
        return self

    def run(self, step: Any) -> Any:
        self.clock.now += self.launch_seconds
        self.clock.work(self.work_seconds)

    def launch(self, step: Any) -> Any:
        self.run(SimpleNamespace(layout=step))
        return step

    def step(self, is_decode: bool, *, pause: float, launch: float, work: float) -> None:
        """After a pause of the host, a step."""
        self.clock.now += pause
        self.launch_seconds, self.work_seconds = launch, work
        self.launch(SimpleNamespace(is_decode=is_decode))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device whose host's clock is the meter's."""
    device = Device()
    monkeypatch.setattr(idle, "time", SimpleNamespace(perf_counter=lambda: device.now))
    return device


def metered(runner: Runner) -> StepMeter:
    meter_of: Any = runner
    return StepMeter(meter_of, runner.clock.mark)


def test_a_device_that_is_kept_busy_is_never_idle(device: Device) -> None:
    runner = Runner(device)
    with metered(runner) as meter:
        for _ in range(10):
            runner.step(DECODE, pause=0.001, launch=0.002, work=0.01)
    totals = meter.totals()
    assert totals.gpu_idle_share == pytest.approx(0)
    assert totals.gpu_idle_gaps == 9
    assert totals.decode_seconds == pytest.approx(0.1 + 0.002)  # the first launch was on its own
    assert totals.prefill_seconds == 0


def test_launching_a_graph_to_an_idle_device_is_idle_time(device: Device) -> None:
    """A mark before the launch happens at once; the graph does not begin before its end."""
    runner = Runner(device)
    with metered(runner) as meter:
        for _ in range(10):
            runner.step(DECODE, pause=0.03, launch=0.002, work=0.01)
    totals = meter.totals()
    # From the end of a step: 0.02 until the host goes on, then the launch.
    assert totals.gpu_idle_share == pytest.approx(0.022 / 0.032, rel=0.02)


def test_kernels_that_are_issued_one_by_one_begin_at_once(device: Device) -> None:
    runner = Runner(device, captured=False)
    with metered(runner) as meter:
        for _ in range(10):
            runner.step(DECODE, pause=0.03, launch=0.002, work=0.01)
    # What the simulated launch takes is part of the step here.
    assert meter.totals().gpu_idle_share == pytest.approx(0.02 / 0.032, rel=0.02)


@pytest.mark.parametrize("seed", range(10))
def test_the_share_is_that_of_the_device_and_no_less(device: Device, seed: int) -> None:
    rng = random.Random(seed)
    runner = Runner(device)
    with metered(runner) as meter:
        runner.step(DECODE, pause=0, launch=0, work=0.01)
        begin, device.idle = device.free - 0.01, 0.0
        launches = 0.0
        for _ in range(200):
            launch = rng.uniform(0.001, 0.002)
            runner.step(DECODE, pause=rng.uniform(0, 0.03), launch=launch, work=0.01)
            launches += launch
    true_share = device.idle / (device.free - 0.01 - begin)
    share = meter.totals().gpu_idle_share
    assert share is not None
    assert true_share <= share + 1e-9
    assert share <= true_share + launches / (device.free - begin)
    assert share == pytest.approx(true_share, abs=0.02)


def test_gaps_around_prefill_do_not_count(device: Device) -> None:
    runner = Runner(device)
    with metered(runner) as meter:
        for kind in (PREFILL, DECODE, DECODE, PREFILL, PREFILL, DECODE, DECODE, DECODE, PREFILL):
            pause = 0.03 if kind is PREFILL else 0.0
            runner.step(kind, pause=pause, launch=0.001, work=0.01)
    totals = meter.totals()
    assert totals.gpu_idle_gaps == 3
    assert totals.gpu_idle_share == pytest.approx(0)
    assert totals.prefill_seconds == pytest.approx(4 * 0.01, abs=0.004)


def test_without_two_decode_steps_in_a_row_there_is_no_share(device: Device) -> None:
    runner = Runner(device)
    with metered(runner) as meter:
        assert meter.totals().gpu_idle_share is None
        runner.step(PREFILL, pause=0, launch=0.001, work=0.01)
        runner.step(DECODE, pause=0, launch=0.001, work=0.01)
    assert meter.totals().gpu_idle_share is None
    assert meter.totals().gpu_idle_gaps == 0


def test_the_runner_is_as_before_even_after_an_error(device: Device) -> None:
    runner = Runner(device)
    before = dict(vars(runner))
    with metered(runner):
        assert vars(runner).keys() - before.keys() == {"run", "launch"}
    with pytest.raises(AttributeError), metered(runner):
        runner.launch(None)
    assert vars(runner) == before


def test_an_engine_gives_the_same_tokens_and_its_time_by_kind() -> None:
    options: Any = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "use_tqdm": False}
    with LLM(device="cpu", num_kvcache_blocks=4) as engine:
        before = engine.generate(["Once upon"], **options)
        with StepMeter(engine.model_runner) as meter:
            assert engine.generate(["Once upon"], **options) == before
        totals = meter.totals()
        engine.generate(["Once upon"], **options)
        assert meter.totals() == totals
    assert totals.gpu_idle_share is None
    assert totals.gpu_idle_gaps == 3
    assert 0 < totals.prefill_seconds < 60
    assert 0 < totals.decode_seconds < 60
