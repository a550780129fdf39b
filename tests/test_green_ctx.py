"""Green contexts on the CPU, against a fake driver that deals out numbered SMs.

`FakeDriver` stands for the module `cuda.bindings.driver`. It keeps the real one's rules: groups are
rounded up, only the device's own resource can be split, a context may join parts of one split only,
and a stream belongs to a partition if it was created on it. The same checks on a real GPU, where
kernels report the SMs they ran on, are in tests/gpu/test_green_ctx.py.

Run: `python -m pytest tests/test_green_ctx.py`
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from enum import IntEnum
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import green_ctx
from green_ctx import (
    Driver,
    DriverError,
    Granularity,
    GreenContextError,
    GreenContextUnavailable,
    GreenDevice,
    Lease,
    Partition,
    PartitionClosed,
    PartitionInUse,
    PartitionOptions,
)
from nanovllm.engine.green_manager import GreenContextManager, PartitionPlan, plan_partitions

ROOT = Path(green_ctx.__file__).resolve().parent
CUDA0 = torch.device("cuda:0")


class Result(IntEnum):
    """The few of the driver's status codes that these tests need."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_RESOURCE_TYPE = 914
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915


OK = Result.CUDA_SUCCESS
BAD_CONFIGURATION = Result.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION


class FakeDriver:
    """Stands for `cuda.bindings.driver`.

    Args:
        sms: SMs of the device; they are numbered from 0.
        granularity: minimum and alignment of co-scheduled groups; otherwise both are 2.
        fields: whether resources tell minimum and alignment: 13 they do, 12 they have no such
            fields, 0 the fields are there but hold 0.
        unbound: functions that the bindings lack.
        unknown: functions that the bindings have and the driver lacks.
        most_groups: how many groups of a size the device can arrange; default: as many as fit.
        errors: function -> statuses of its calls in turn, then success.
    """

    def __init__(
        self,
        sms: int = 132,
        granularity: tuple[int, int] = (8, 8),
        *,
        fields: int = 13,
        unbound: tuple[str, ...] = (),
        unknown: tuple[str, ...] = (),
        most_groups: Callable[[int], int] = lambda size: sys.maxsize,
        errors: dict[str, list[Result]] | None = None,
    ) -> None:
        self.sms, self.granularity, self.fields = frozenset(range(sms)), granularity, fields
        self.unbound, self.unknown, self.most_groups = unbound, unknown, most_groups
        self.errors = errors or {}
        self.calls: list[str] = []
        self.contexts: dict[int, frozenset[int]] = {}  # live green contexts and their SMs
        self.streams: dict[int, tuple[int, int]] = {}  # live streams: (green context, priority)
        self.current: list[int] = [-1]  # stack of current contexts; -1 is the primary one
        self._handles = count(1000)
        self.CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="SM")

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """The driver's function `name`: logs the call, and fails as `errors` says."""
        if not name.startswith("cu") or name in self.unbound:
            raise AttributeError(name)

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            status = self.errors[name].pop(0) if self.errors.get(name) else OK
            return getattr(self, f"_{name}")(*args) if status is OK else (status, None)

        return call

    def sms_of(self, stream: int) -> frozenset[int]:
        """The SMs that kernels on a live stream may run on."""
        return self.contexts[self.streams[stream][0]]

    def _resource(self, sms: frozenset[int], split: object) -> SimpleNamespace:
        sm = SimpleNamespace(smCount=len(sms))
        if self.fields != 12:
            sm.minSmPartitionSize, sm.smCoscheduledAlignment = (
                self.granularity if self.fields == 13 else (0, 0)
            )
        return SimpleNamespace(sm=sm, sms=sms, split=split)

    def _cuInit(self, flags: int) -> tuple[Any, ...]:
        return (OK,)

    def _cuDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, 13000

    def _cuGetProcAddress(self, symbol: bytes, version: int, flags: int) -> tuple[Any, ...]:
        return OK, 0 if symbol.decode() in self.unknown else 0xC0DE, 0

    def _cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return OK, ordinal

    def _cuDeviceGetDevResource(self, device: int, kind: str) -> tuple[Any, ...]:
        assert kind == "SM"
        return OK, self._resource(self.sms, None)

    def _cuDevSmResourceSplitByCount(
        self, groups: int, resource: Any, flags: int, at_least: int
    ) -> tuple[Any, ...]:
        if resource.split is not None:
            return BAD_CONFIGURATION, None, None, None
        if not 0 < at_least <= len(resource.sms):
            return Result.CUDA_ERROR_INVALID_VALUE, None, None, None
        minimum, alignment = (2, 2) if flags == 1 else self.granularity
        size = max(minimum, -(-at_least // alignment) * alignment)
        made = min(groups, len(resource.sms) // size, self.most_groups(size))
        if made == 0:
            return BAD_CONFIGURATION, None, None, None
        sms, split = sorted(resource.sms), object()
        parts = [frozenset(sms[n * size : (n + 1) * size]) for n in range(made)]
        rest = frozenset(sms[made * size :])
        return OK, [self._resource(p, split) for p in parts], made, self._resource(rest, split)

    def _cuDevResourceGenerateDesc(self, resources: list[Any], number: int) -> tuple[Any, ...]:
        assert len(resources) == number
        if len({id(resource.split) for resource in resources}) != 1:
            return BAD_CONFIGURATION, None
        return OK, frozenset().union(*(resource.sms for resource in resources))

    def _cuGreenCtxCreate(self, desc: frozenset[int], device: int, flags: int) -> tuple[Any, ...]:
        assert flags == green_ctx.DEFAULT_STREAM
        context = next(self._handles)
        self.contexts[context] = desc
        return OK, context

    def _cuGreenCtxDestroy(self, context: int) -> tuple[Any, ...]:
        assert all(owner != context for owner, _ in self.streams.values()), "streams go first"
        del self.contexts[context]
        return (OK,)

    def _cuGreenCtxGetDevResource(self, context: int, kind: str) -> tuple[Any, ...]:
        return OK, self._resource(self.contexts[context], object())

    def _cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> tuple[Any, ...]:
        assert flags == green_ctx.NON_BLOCKING
        stream = next(self._handles)
        self.streams[stream] = (context, priority)
        return OK, stream

    def _cuCtxFromGreenCtx(self, context: int) -> tuple[Any, ...]:
        return OK, context

    def _cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:
        self.current.append(context)
        return (OK,)

    def _cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return OK, self.current.pop()

    def _cuStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[Any, ...]:
        return self._cuGreenCtxStreamCreate(self.current[-1], flags, priority)

    def _cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert stream in self.streams
        return (OK,)

    def _cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.streams[stream]
        return (OK,)


def device_with(fake: FakeDriver) -> GreenDevice:
    return GreenDevice(0, Driver(fake))


def manager_with(fake: FakeDriver, attention: int, ffn: int, **options: Any) -> GreenContextManager:
    return GreenContextManager(CUDA0, attention, ffn, driver=Driver(fake), **options)


# What there is to split, and what a driver may lack.


@pytest.mark.parametrize("fields", [13, 12, 0], ids=["told", "no fields", "fields are 0"])
@pytest.mark.parametrize("sizes", [(8, 8), (4, 2), (2, 2), (1, 1)])
def test_granularity_is_told_or_found_out(sizes: tuple[int, int], fields: int) -> None:
    device = device_with(FakeDriver(108, sizes, fields=fields))
    assert device.sm_count == 108
    assert device.granularity() == Granularity(*sizes)
    assert device.granularity(coscheduled=False) == Granularity(2, 2)


def test_granularity_of_a_device_that_makes_one_group_only() -> None:
    assert device_with(FakeDriver(8, fields=12)).granularity() == Granularity(8, 8)
    assert device_with(FakeDriver(10, fields=12)).granularity() == Granularity(8, 8)
    with pytest.raises(GreenContextUnavailable, match="device 0 cannot be split"):
        device_with(FakeDriver(4, fields=12)).granularity()


def test_missing_bindings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(GreenContextUnavailable, match="cuda-bindings cannot be imported"):
        Driver()


def test_missing_driver_library_is_named() -> None:
    def no_library(flags: int) -> tuple[Any, ...]:
        raise RuntimeError("libcuda.so.1 was not found")

    with pytest.raises(GreenContextUnavailable, match=r"no CUDA driver: libcuda\.so\.1"):
        Driver(SimpleNamespace(cuInit=no_library))


def test_no_device_is_a_driver_error() -> None:
    with pytest.raises(DriverError, match="CUDA_ERROR_NO_DEVICE") as caught:
        Driver(FakeDriver(errors={"cuInit": [Result.CUDA_ERROR_NO_DEVICE]}))
    assert (caught.value.function, caught.value.code) == ("cuInit", 100)


@pytest.mark.parametrize("lack", ["unbound", "unknown"])
def test_missing_green_context_functions_are_named(lack: str) -> None:
    lacks: dict[str, Any] = {lack: ("cuGreenCtxCreate", "cuGreenCtxDestroy")}
    with pytest.raises(
        GreenContextUnavailable, match=r"13\.0; missing: cuGreenCtxCreate, cuGreenCtxDestroy"
    ):
        Driver(FakeDriver(**lacks))


IMPORTS = """
import sys, types
import green_ctx
assert not {"torch", "cuda"} & set(sys.modules), "green_ctx imports nothing heavy"

class Poison(types.ModuleType):
    def __getattr__(self, name):
        if name.lower().startswith("cu"):
            raise RuntimeError(f"{name} was touched at import")
        raise AttributeError(name)

import torch  # which may import the bindings for itself
sys.modules["cuda.bindings.driver"] = Poison("cuda.bindings.driver")
import nanovllm.engine.green_manager
"""


def test_import_calls_no_driver() -> None:
    subprocess.run(
        [sys.executable, "-c", IMPORTS], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )


def test_main_prints_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(green_ctx, "GreenDevice", lambda ordinal: device_with(FakeDriver()))
    assert green_ctx.main() == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "device 0: 132 SMs, driver for CUDA 13.0"
    assert "coscheduled=True: minimum 8, alignment 8" in lines
    assert "36 asked 40 granted 92 left" in lines
    assert "36 asked 36 granted 96 left" in lines


def test_main_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert green_ctx.main() == 1
    assert "green contexts are not available: cuda-bindings" in capsys.readouterr().err


# Splits.


@pytest.mark.parametrize(
    ("counts", "granted", "left", "handles"),
    [
        ([96], [96], 36, [1]),
        ([90], [96], 36, [1]),
        ([64, 64], [64, 64], 4, [1, 1]),
        ([16, 16], [16, 16], 100, [1, 1]),
        ([80, 40], [80, 40], 12, [2, 1]),
        ([8, 24, 16], [8, 24, 16], 84, [1, 3, 2]),
    ],
)
def test_split(counts: list[int], granted: list[int], left: int, handles: list[int]) -> None:
    split = device_with(FakeDriver()).split(counts)
    assert [group.sm_count for group in split.groups] == granted
    assert [len(group.handles) for group in split.groups] == handles
    assert split.remainder is not None
    assert split.remainder.sm_count == left


def test_split_without_remainder() -> None:
    assert device_with(FakeDriver(128)).split([64, 64]).remainder is None


def test_split_takes_smaller_units_where_large_ones_do_not_fit() -> None:
    fake = FakeDriver(most_groups=lambda size: 1 if size > 16 else 16)
    split = device_with(fake).split([64, 32])
    assert [len(group.handles) for group in split.groups] == [4, 2]  # units of 16, not of 32


def test_split_that_the_device_cannot_arrange() -> None:
    with pytest.raises(GreenContextUnavailable, match=r"132 SMs cannot make groups of \[64, 64\]"):
        device_with(FakeDriver(most_groups=lambda size: 1)).split([64, 64])


@pytest.mark.parametrize("counts", [[], [0], [-8], [True], [8.0], ["8"], [132, 8]])
def test_split_refuses(counts: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"counts=|do not fit device 0 with 132 SMs"):
        device_with(FakeDriver()).split(counts)


# Partitions: what they own, and when it goes.


def test_partition_streams_and_order_of_close() -> None:
    fake = FakeDriver()
    device = device_with(fake)
    options = PartitionOptions(num_streams=3, priority=-1)
    partition = Partition(device, device.split([40]).groups[0], options)
    assert partition.sm_count == 40
    assert len(set(partition.stream_handles)) == 3
    assert {fake.streams[stream][1] for stream in partition.stream_handles} == {-1}
    fake.calls.clear()
    partition.close()
    assert fake.calls == ["cuStreamSynchronize", "cuStreamDestroy"] * 3 + ["cuGreenCtxDestroy"]
    partition.close()
    assert len(fake.calls) == 7
    assert partition.closed


def test_closed_partition_gives_nothing_more() -> None:
    device = device_with(FakeDriver())
    with Partition(device, device.split([40]).groups[0]) as partition:
        pass
    for use in (partition.torch_stream, lambda: partition.hold("a graph")):
        with pytest.raises(PartitionClosed):
            use()


def test_held_partition_refuses_to_close() -> None:
    fake = FakeDriver()
    device = device_with(fake)
    partition = Partition(device, device.split([40]).groups[0])
    first, second = partition.hold("graph of batch 8"), partition.hold("graph of batch 16")
    with pytest.raises(PartitionInUse, match="held for: graph of batch 8, graph of batch 16"):
        partition.close()
    first.release()
    first.release()
    with second, pytest.raises(PartitionInUse, match="held for: graph of batch 16"):
        partition.close()
    assert fake.streams
    partition.close()
    assert not fake.streams
    assert not fake.contexts


@pytest.mark.parametrize("lack", ["unbound", "unknown"])
def test_second_way_to_a_stream(lack: str) -> None:
    lacks: dict[str, Any] = {lack: ("cuGreenCtxStreamCreate",)}
    fake = FakeDriver(**lacks)
    device = device_with(fake)
    with Partition(device, device.split([40]).groups[0]) as partition:
        assert fake.sms_of(partition.stream_handles[0]) == frozenset(range(40))
        assert fake.current == [-1]
        assert "cuStreamCreateWithPriority" in fake.calls


def test_second_way_restores_the_context_when_it_fails() -> None:
    fake = FakeDriver(
        unbound=("cuGreenCtxStreamCreate",),
        errors={"cuStreamCreateWithPriority": [Result.CUDA_ERROR_OUT_OF_MEMORY]},
    )
    device = device_with(fake)
    with pytest.raises(DriverError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        Partition(device, device.split([40]).groups[0])
    assert fake.current == [-1]
    assert not fake.contexts


def test_failing_close_goes_on_to_the_end() -> None:
    fake = FakeDriver(errors={"cuStreamSynchronize": [Result.CUDA_ERROR_INVALID_VALUE]})
    device = device_with(fake)
    partition = Partition(device, device.split([40]).groups[0], PartitionOptions(num_streams=2))
    with pytest.raises(DriverError, match="cuStreamSynchronize"):
        partition.close()
    assert partition.closed
    assert not fake.streams
    assert not fake.contexts


def test_torch_stream_wraps_the_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped: list[tuple[int, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "ExternalStream", lambda handle, device: wrapped.append((handle, device))
    )
    with manager_with(FakeDriver(), 16, 16, num_streams=2) as manager:
        manager.get_attention_stream()
        manager.get_ffn_stream(1)
        expected = manager.attention.stream_handles[0], manager.ffn.stream_handles[1]
    assert wrapped == [(handle, CUDA0) for handle in expected]


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_streams", 0), ("num_streams", True), ("num_streams", 1.0), ("priority", "high")],
)
def test_partition_options_refuse(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field}={value!r} is not allowed: it must be an int"):
        PartitionOptions(**{field: value})


# The manager.


@pytest.mark.parametrize(
    ("asked", "granted", "options"),
    [
        ((16, 16), (16, 16), {}),
        ((1, 1), (8, 8), {}),
        ((30, 90), (32, 96), {}),
        ((24, 40), (24, 40), {}),
        ((36, 96), (36, 96), {}),  # they fill the device: attention has the remainder
        ((33, 96), (36, 96), {}),  # 40 + 96 would not fit, the remainder of 36 does
        ((66, 64), (68, 64), {}),
        ((16, 116), (16, 116), {}),  # 116 rounded up would not fit: the FFN has the remainder
        ((40, 92), (40, 92), {}),
        ((36, 44), (36, 44), {"coscheduled": False}),
        ((16, 116), (16, 116), {"coscheduled": False}),
    ],
)
def test_manager_grants(
    asked: tuple[int, int], granted: tuple[int, int], options: dict[str, Any]
) -> None:
    fake = FakeDriver()
    with manager_with(fake, *asked, **options) as manager:
        assert (manager.attention_sms, manager.ffn_sms) == granted
        assert manager.granted.unused == 132 - sum(granted)
        assert manager.granted.disjoint
        attention, ffn = (
            fake.sms_of(side.stream_handles[0]) for side in (manager.attention, manager.ffn)
        )
        assert (len(attention), len(ffn)) == granted
        assert not attention & ffn
    assert manager.closed
    assert not fake.streams
    assert not fake.contexts


@pytest.mark.parametrize("value", [0, -8, True, 16.0, "16", None])
@pytest.mark.parametrize("side", ["attention", "ffn"])
def test_manager_refuses_counts(side: str, value: Any) -> None:
    fake = FakeDriver()
    with pytest.raises(ValueError, match=f"pipeline_{side}_sm_count={value!r} is not allowed"):
        manager_with(fake, **({"attention": 16, "ffn": 16} | {side: value}))
    assert "cuGreenCtxCreate" not in fake.calls


def test_manager_refuses_more_than_the_device_has() -> None:
    with pytest.raises(ValueError, match=r"need 137 SMs, and the device has 132"):
        manager_with(FakeDriver(), 60, 73)


def test_manager_refuses_a_device_that_is_not_cuda() -> None:
    with pytest.raises(ValueError, match="device='cpu' is not allowed: it must be a CUDA device"):
        GreenContextManager(torch.device("cpu"), 16, 16)


def test_manager_logs_the_drivers_code_and_name(caplog: pytest.LogCaptureFixture) -> None:
    fake = FakeDriver(
        errors={"cuDevSmResourceSplitByCount": [Result.CUDA_ERROR_INVALID_RESOURCE_TYPE]}
    )
    with caplog.at_level(logging.WARNING), pytest.raises(DriverError) as caught:
        manager_with(fake, 16, 16)
    assert (caught.value.code, caught.value.name) == (914, "CUDA_ERROR_INVALID_RESOURCE_TYPE")
    assert caplog.messages == [
        "[GreenContextManager] Failed to initialize Green Context: CUDA error code=914 "
        "(CUDA_ERROR_INVALID_RESOURCE_TYPE) in cuDevSmResourceSplitByCount"
    ]


STEPS = ["DevResourceGenerateDesc", "GreenCtxCreate", "GreenCtxGetDevResource"]


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("step", [*STEPS, "GreenCtxStreamCreate"])
def test_manager_that_fails_half_way_leaks_nothing(step: str, nth: int) -> None:
    errors = {f"cu{step}": [OK] * (nth - 1) + [Result.CUDA_ERROR_OUT_OF_MEMORY]}
    fake = FakeDriver(errors=errors)
    with pytest.raises(DriverError) as caught:
        manager_with(fake, 16, 32)
    assert (caught.value.function, caught.value.code) == (f"cu{step}", 2)
    assert not fake.streams
    assert not fake.contexts


def test_manager_held_on_one_side_closes_neither() -> None:
    fake = FakeDriver()
    manager = manager_with(fake, 16, 32)
    for owner in (manager, manager.attention, manager.ffn):
        with owner.hold("a graph"), pytest.raises(PartitionInUse):
            manager.close()
        assert len(fake.streams) == 2
    fake.calls.clear()
    manager.close()
    manager.close()
    one = ["cuStreamSynchronize", "cuStreamDestroy", "cuGreenCtxDestroy"]
    assert fake.calls == one * 2
    with pytest.raises(PartitionClosed):
        Lease([manager.attention], "too late")


def test_several_managers_live_side_by_side() -> None:
    fake = FakeDriver()
    splits = [(36, 96), (68, 64), (16, 16), (16, 16)]
    managers = [manager_with(fake, *split) for split in splits]
    assert [(m.attention_sms, m.ffn_sms) for m in managers] == splits
    managers[1].close()
    assert len(fake.contexts) == 6
    for manager in managers:
        manager.close()
    assert not fake.contexts


def test_plan_gives_attention_the_remainder_when_both_fill_the_device() -> None:
    sizes = Granularity(minimum=8, alignment=8)
    assert plan_partitions(128, sizes, 32, 96) == PartitionPlan(attention=None, ffn=96)
    assert plan_partitions(128, sizes, 24, 96) == PartitionPlan(attention=24, ffn=96)


def test_plan_on_a_device_whose_minimum_is_above_its_alignment() -> None:
    # Two groups come from equal units of 4 SMs or more; one group and the remainder do not.
    sizes = Granularity(minimum=4, alignment=2)
    assert plan_partitions(108, sizes, 17, 18) == PartitionPlan(attention=20, ffn=20)
    assert plan_partitions(108, sizes, 18, 90) == PartitionPlan(attention=None, ffn=90)


@settings(deadline=None)  # shared machines stall now and then
@given(
    sms=st.integers(1, 200),
    alignment=st.sampled_from([1, 2, 4, 8, 16]),
    minimum_steps=st.integers(1, 3),
    fields=st.sampled_from([13, 12, 0]),
    asked=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    scarce=st.sampled_from([None, 1, 16]),
)
def test_any_split_is_enough_aligned_and_disjoint_or_an_error(
    sms: int,
    alignment: int,
    minimum_steps: int,
    fields: int,
    asked: tuple[int, int],
    scarce: int | None,
) -> None:
    fake = FakeDriver(
        sms,
        (alignment * minimum_steps, alignment),
        fields=fields,
        most_groups=lambda size: 1 if scarce and size > scarce else sys.maxsize,
    )
    try:
        manager = manager_with(fake, *asked)
    except ValueError:
        aligned = max(alignment * minimum_steps, -(-asked[1] // alignment) * alignment)
        assert asked[0] + aligned > sms
    except GreenContextError:
        assert scarce or sms < alignment * (minimum_steps + 1)
    else:
        attention, ffn = (
            fake.sms_of(side.stream_handles[0]) for side in (manager.attention, manager.ffn)
        )
        assert (len(attention), len(ffn)) == (manager.attention_sms, manager.ffn_sms)
        assert manager.attention_sms >= asked[0]
        assert manager.ffn_sms >= asked[1]
        assert manager.ffn_sms % alignment == 0
        assert manager.attention_sms % alignment == 0 or manager.granted.unused == 0
        assert not attention & ffn
        assert attention | ffn <= fake.sms
        manager.close()
    assert not fake.streams
    assert not fake.contexts
    assert fake.current == [-1]
