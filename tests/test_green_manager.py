"""The attention and the FFN partition, on the CPU, against a fake driver."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from green_ctx import (
    DriverError,
    Granularity,
    GreenContextError,
    Lease,
    PartitionClosed,
    PartitionInUse,
)
from nanovllm.engine.green_manager import GreenContextManager, PartitionPlan, plan_partitions
from tests.fake_driver import (
    OK,
    FakeDriver,
    Result,
    manager_with,
)


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


@example(sms=49, alignment=16, minimum_steps=3, fields=13, asked=(2, 1), scarce=None)
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
    # What each side takes as an aligned group, and whether the other then gets what it asked for.
    groups = [max(alignment * minimum_steps, -(-wish // alignment) * alignment) for wish in asked]
    ffn_aligned_fits = asked[0] + groups[1] <= sms
    attention_aligned_fits = groups[0] + asked[1] <= sms
    try:
        manager = manager_with(fake, *asked)
    except ValueError:
        assert not ffn_aligned_fits
        assert not attention_aligned_fits
    except GreenContextError:
        assert scarce or sms < alignment * (minimum_steps + 1)
    else:
        attention, ffn = (
            fake.sms_of(side.stream_handles[0]) for side in (manager.attention, manager.ffn)
        )
        assert (len(attention), len(ffn)) == (manager.attention_sms, manager.ffn_sms)
        assert manager.attention_sms >= asked[0]
        assert manager.ffn_sms >= asked[1]
        if ffn_aligned_fits:
            assert manager.ffn_sms % alignment == 0
            assert manager.attention_sms % alignment == 0 or manager.granted.unused == 0
        else:  # the FFN has the remainder
            assert manager.attention_sms % alignment == 0
            assert manager.granted.unused == 0
        assert not attention & ffn
        assert attention | ffn <= fake.sms
        manager.close()
    assert not fake.streams
    assert not fake.contexts
    assert fake.current == [-1]
