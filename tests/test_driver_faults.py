"""Every driver call of a pipeline's whole life fails once, by status and by exception.

Whichever call it is, nothing stays behind and decode falls back to sequential execution.
"""

from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import pytest

import green_ctx
from green_ctx import Driver, DriverError, GreenContextError
from nanovllm.engine import green_manager, pipeline_modes
from nanovllm.engine.green_manager import Partitions
from nanovllm.engine.pipeline_modes import Pipelines
from nanovllm.engine.plan import SEQUENTIAL
from tests.fake_driver import (
    CUDA0,
    FakeDriver,
    Result,
    build,
    install,
    manager_with,
    partitions_with,
)
from tests.interrupts import InterruptAt

OLD_STREAMS = {"unbound": ("cuGreenCtxStreamCreate",)}
BOTH_WAYS = pytest.mark.parametrize("drivers", [{}, OLD_STREAMS], ids=["new", "older streams"])
CLEAN = ({}, {}, [-1], [])  # contexts, streams, current contexts and misuse of a fake driver
# What a driver tells and lacks, and what is asked of it.
SETUPS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "new driver": ({}, (16, 32)),
    "older streams": (OLD_STREAMS, (16, 32)),
    "several units": ({}, (40, 80)),
    "remainder": ({}, (36, 96)),
    "small units": ({"most_groups": lambda size: 1 if size > 16 else 16}, (16, 32)),
    "one lane": ({}, (40,)),
    "whole device": (OLD_STREAMS, (130,)),
    "three lanes": ({}, (36, 88, 8)),
    "three lanes, older streams": (OLD_STREAMS, (36, 88, 8)),
    "four lanes": ({"sms": 108, "granularity": (4, 2)}, (10, 20, 30, 40)),
}
CALLERS = (green_ctx, green_manager, pipeline_modes)
EXCEPTIONS: tuple[Callable[[str], Exception], ...] = (
    *(RuntimeError, AttributeError, TypeError, OSError, ValueError, MemoryError, SystemError),
)
STATUSES = (Result.CUDA_ERROR_OUT_OF_MEMORY, Result.CUDA_ERROR_INVALID_RESOURCE_TYPE, 46, -7)


def live(fake: FakeDriver, *counts: int) -> None:
    """Partitions from the first driver call to the last, and a second close."""
    partitions = partitions_with(fake, *(counts or (16, 32)))
    try:
        partitions.close()
    finally:
        calls = len(fake.calls)
        partitions.close()
        assert (len(fake.calls), partitions.closed) == (calls, True)


def check_nothing_left(fake: FakeDriver) -> None:
    """Beyond the one handle whose destruction was made to fail."""
    assert (fake.contexts, fake.streams, fake.current, fake.misuse) == CLEAN
    failed = fake.calls[fake.fail_at - 1]
    assert len(fake.lost) == failed.endswith("Destroy")


def calls_of(setup: str) -> list[str]:
    drivers, counts = SETUPS[setup]
    fake = FakeDriver(**drivers)
    live(fake, *counts)
    return fake.calls


FAULTS = [(setup, number + 1) for setup in SETUPS for number in range(len(calls_of(setup)))]


@pytest.mark.parametrize("by", ["status", "exception"])
@pytest.mark.parametrize(("setup", "number"), FAULTS)
def test_any_call_may_fail(setup, number, by):
    drivers, counts = SETUPS[setup]
    failure: Any = STATUSES[number % len(STATUSES)]
    if by == "exception":
        failure = EXCEPTIONS[number % len(EXCEPTIONS)]("out of the bindings")
    fake = FakeDriver(**drivers, fail_at=number, failure=failure)
    function = calls_of(setup)[number - 1]
    with pytest.raises(GreenContextError) as caught:
        live(fake, *counts)
    error = caught.value
    if isinstance(error, DriverError):
        expected = (function, 999, type(failure).__name__)
        if by == "status":
            expected = (function, int(failure), getattr(failure, "name", "unknown"))
        assert (error.function, error.code, error.name) == expected
    else:
        assert function == "cuInit"
    assert by == "status" or "out of the bindings" in str(error)
    check_nothing_left(fake)


def build_with(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Pipelines:
    install(monkeypatch, fake)
    return build(**options)


class InterruptAtStep(InterruptAt):
    """Raises before an instruction of the interpreter instead, in calls of the driver.

    Signals that come while the driver works are raised right after it returns, within a line.
    """

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code is not Driver.__call__.__code__:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return super().__call__(frame, "line" if event == "opcode" else event, arg)


def each_interrupt(fewest: int, most: int, kind: type[InterruptAt] = InterruptAt) -> Any:
    """Interrupts of the driver's callers, at every line in turn until one is not met."""
    for line in range(1, most):
        interrupt = kind(line, [module.__file__ for module in CALLERS])
        yield interrupt
        if not interrupt.reached:
            break
    assert fewest < line < most


@BOTH_WAYS
def test_an_interrupt_at_any_line_leaves_nothing(drivers, monkeypatch):
    for interrupt in each_interrupt(300, 5000):
        fake = FakeDriver(**drivers)
        with suppress(KeyboardInterrupt), interrupt:
            built = build_with(fake, monkeypatch)
        if not interrupt.reached:
            built.partitions.close()
        assert (fake.contexts, fake.streams, fake.current, fake.misuse) == CLEAN


@BOTH_WAYS
def test_an_interrupt_at_any_line_of_close_is_made_good_by_the_next(drivers):
    for interrupt in each_interrupt(50, 1000):
        fake = FakeDriver(**drivers)
        partitions = partitions_with(fake, 36, 88, 8)
        with suppress(KeyboardInterrupt), interrupt:
            partitions.close()
        partitions.close()
        assert (fake.contexts, fake.streams, fake.current, fake.misuse) == CLEAN


@BOTH_WAYS
def test_an_interrupt_at_any_step_of_a_driver_call_loses_no_handle(drivers):
    for interrupt in each_interrupt(500, 10000, InterruptAtStep):
        fake = FakeDriver(**drivers)
        driver, partitions = Driver(fake), None
        with suppress(KeyboardInterrupt), interrupt:
            partitions = Partitions(CUDA0, (16, 32), driver=driver)
            partitions.close()
        if partitions is not None:
            partitions.close()
        assert (fake.contexts, fake.streams, fake.current, fake.misuse) == CLEAN


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("by", ["status", "exception"])
@BOTH_WAYS
def test_the_engine_falls_back_whichever_call_fails(drivers, by, strict, monkeypatch):
    counted = FakeDriver(**drivers)
    build_with(counted, monkeypatch)
    assert len(counted.calls) >= 15
    for number in range(1, len(counted.calls) + 1):
        failure: Any = 46 if by == "status" else RuntimeError("out of the bindings")
        fake = FakeDriver(**drivers, fail_at=number, failure=failure)
        if strict:
            with pytest.raises(GreenContextError):
                build_with(fake, monkeypatch, pipeline_strict=True)
        else:
            built = build_with(fake, monkeypatch)
            assert [scheduler.plan for scheduler in built.schedulers] == [SEQUENTIAL]
            assert built.statistics.mode == "sequential"
            assert built.statistics.fallback_reason
        check_nothing_left(fake)


@pytest.mark.parametrize("answer", [None, 7, (), ("?",), (None, 1)])
def test_an_answer_that_is_none_is_a_driver_error(answer):
    fake = FakeDriver()
    fake._cuGreenCtxCreate = lambda *args: answer  # type: ignore[method-assign]
    with pytest.raises(DriverError, match="in cuGreenCtxCreate"):
        live(fake)


def test_close_raises_the_first_error_and_destroys_the_rest():
    out_of_memory, invalid = Result.CUDA_ERROR_OUT_OF_MEMORY, Result.CUDA_ERROR_INVALID_VALUE
    fake = FakeDriver(
        errors={"cuStreamSynchronize": [out_of_memory], "cuGreenCtxDestroy": [invalid, invalid]}
    )
    partitions = partitions_with(fake, 36, 88, 8)
    with pytest.raises(DriverError) as caught:
        partitions.close()
    assert (caught.value.function, caught.value.code) == ("cuStreamSynchronize", 2)
    assert (fake.streams, fake.contexts, len(fake.lost)) == ({}, {}, 2)
    calls = len(fake.calls)
    partitions.close()
    assert len(fake.calls) == calls


def test_a_failure_while_undoing_does_not_hide_why(caplog):
    fake = FakeDriver(
        errors={
            "cuGreenCtxGetDevResource": [Result.CUDA_ERROR_OUT_OF_MEMORY],
            "cuGreenCtxDestroy": [Result.CUDA_ERROR_INVALID_VALUE],
        }
    )
    with pytest.raises(DriverError, match=r"code=2 .* in cuGreenCtxGetDevResource"):
        manager_with(fake, 16, 32)
    assert any("cuGreenCtxDestroy" in message for message in caplog.messages)


def test_every_call_is_made_to_fail_once_by_status_and_once_by_exception():
    functions = {name for setup in SETUPS for name in calls_of(setup)}
    defined = {name[1:] for name in vars(FakeDriver) if name.startswith("_cu")}
    assert functions == defined
