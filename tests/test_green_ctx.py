"""Green contexts on the CPU, against a fake driver.

The same checks on a real GPU, where kernels report the SMs they ran on, are in
tests/gpu/test_green_ctx.py.

Run: `python -m pytest tests/test_green_ctx.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import green_ctx
from green_ctx import (
    Driver,
    DriverError,
    Granularity,
    GreenContextUnavailable,
    Partition,
    PartitionClosed,
    PartitionInUse,
    PartitionOptions,
)
from tests.fake_driver import (
    CUDA0,
    ROOT,
    FakeDriver,
    Result,
    device_with,
    manager_with,
)


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
