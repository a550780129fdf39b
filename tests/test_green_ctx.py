"""Green contexts on the CPU, against a fake driver.

The same checks on a real GPU, where kernels report the SMs they ran on, are in
tests/gpu/test_green_ctx.py.
"""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import green_ctx
from green_ctx import (
    Driver,
    Granularity,
    GreenContexts,
    GreenContextUnavailable,
    plan_partitions,
)
from tests.fake_driver import ROOT, FakeDriver, device_with


@pytest.mark.parametrize("sizes", [(8, 8), (4, 2), (2, 2), (1, 1)])
def test_granularity_is_found_out(sizes):
    device = device_with(FakeDriver(108, sizes))
    assert device.sm_count == 108
    assert device.granularity() == Granularity(*sizes)


def test_granularity_of_a_device_that_makes_one_group_only():
    assert device_with(FakeDriver(8)).granularity() == Granularity(8, 8)
    assert device_with(FakeDriver(10)).granularity() == Granularity(8, 8)
    with pytest.raises(GreenContextUnavailable, match="device 0 with 4 SMs cannot be split"):
        device_with(FakeDriver(4)).granularity()


def test_bindings_that_are_too_old_are_named():
    bindings = FakeDriver()
    for types in (SimpleNamespace(), None):
        bindings.CUdevResourceType = types
        with pytest.raises(GreenContextUnavailable, match=r"the driver is for 13\.0$"):
            Driver(bindings)


IMPORTS = """
import sys, types
before = set(sys.modules)  # old bindings import themselves when the interpreter starts
import green_ctx
assert not {"torch", "cuda"} & (set(sys.modules) - before), "green_ctx imports nothing heavy"

class Poison(types.ModuleType):
    def __getattr__(self, name):
        if name.lower().startswith("cu"):
            raise RuntimeError(f"{name} was touched at import")
        raise AttributeError(name)

import torch  # which may import the bindings for itself
sys.modules["cuda.bindings.driver"] = Poison("cuda.bindings.driver")
import nanovllm.engine.green_manager
"""


def test_import_calls_no_driver():
    subprocess.run(
        [sys.executable, "-c", IMPORTS], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
    )


def test_main_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(green_ctx, "GreenDevice", lambda ordinal: device_with(FakeDriver()))
    assert green_ctx.main() == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "device 0 with 132 SMs, driver for CUDA 13.0"
    assert "groups of 8 SMs or more, in multiples of 8" in lines
    assert "36 asked 40 granted 92 left" in lines


def test_main_says_why_not(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert green_ctx.main() == 1
    assert "green contexts are not available: cuda-bindings" in capsys.readouterr().err


# Plans and splits.

EIGHTS = Granularity(minimum=8, alignment=8)


@pytest.mark.parametrize(
    ("total", "sizes", "counts", "plan"),
    [
        (132, EIGHTS, [36], [40]),
        (132, EIGHTS, [130], [None]),  # 136 would not fit: all of the device
        (132, EIGHTS, [36, 96], [None, 96]),
        (132, EIGHTS, [16, 116], [16, None]),  # 116 rounded up would not fit
        (132, EIGHTS, [24, 64, 8], [24, 64, 8]),
        (132, EIGHTS, [44, 80, 8], [None, 80, 8]),  # 48 + 80 + 8 would not fit
        (132, EIGHTS, [48, 60, 24], [48, None, 24]),  # with 64 aligned nothing would
        (132, EIGHTS, [16, 64, 44, 4], [16, 64, None, 8]),
        (128, EIGHTS, [24, 96], [24, 96]),
        (128, EIGHTS, [32, 88, 8], [None, 88, 8]),  # the first, when all fill the device
        # Several groups come from equal units of 4 SMs or more; one and the remainder do not.
        (108, Granularity(4, 2), [17, 18], [20, 20]),
        (108, Granularity(4, 2), [18, 90], [None, 90]),
        (108, Granularity(4, 2), [16, 78, 10], [None, 80, 12]),
        (132, EIGHTS, list(np.array([30, 60])), [32, 64]),
    ],
)
def test_plan(total, sizes, counts, plan):
    assert plan_partitions(total, sizes, counts) == plan


@pytest.mark.parametrize("value", [0, -8, True, 16.0, "16", None, [16]])
def test_plan_refuses_what_is_no_count(value):
    with pytest.raises(ValueError, match=r"counts=\[\] is not allowed"):
        plan_partitions(132, EIGHTS, [])
    text = f"counts[1]={value!r} is not allowed: it must be an integer of at least 1"
    with pytest.raises(ValueError, match=re.escape(text)):
        plan_partitions(132, EIGHTS, [16, value])


@pytest.mark.parametrize(
    ("counts", "needed"),
    [([140], 140), ([132, 1], 137), ([60, 65, 8], 137), ([99, 16, 16, 2], 138)],
)
def test_plan_refuses_more_than_the_device_has(counts, needed):
    names = ["first", "second", "third", "fourth"][: len(counts)]
    asked = " and ".join(f"{name}={count}" for name, count in zip(names, counts, strict=True))
    with pytest.raises(ValueError, match=rf"^{asked} .* need {needed} SMs, .* device has 132"):
        plan_partitions(132, EIGHTS, counts, names)


@pytest.mark.parametrize(
    ("counts", "granted", "handles"),
    [
        ([90], [96], [1]),
        ([132], [132], [1]),
        ([64, 64], [64, 64], [1, 1]),
        ([80, 40], [80, 40], [2, 1]),
        ([8, 24, 16], [8, 24, 16], [1, 3, 2]),
        ([36, 88, 8], [36, 88, 8], [1, 11, 1]),
    ],
)
def test_split(counts, granted, handles):
    parts = device_with(FakeDriver()).split(counts)
    assert [part.sm_count for part in parts] == granted
    assert [len(part.handles) for part in parts] == handles


def test_split_takes_smaller_units_where_large_ones_do_not_fit():
    fake = FakeDriver(most_groups=lambda size: 1 if size > 16 else 16)
    parts = device_with(fake).split([64, 32])
    assert [len(part.handles) for part in parts] == [4, 2]  # units of 16, not of 32


def test_split_that_the_device_cannot_arrange():
    with pytest.raises(GreenContextUnavailable, match=r"132 SMs cannot make groups of \[64, 64\]"):
        device_with(FakeDriver(most_groups=lambda size: 1)).split([64, 64])


@example(sms=49, alignment=16, minimum_steps=3, counts=[2, 1], scarce=None, lack=())
@settings(max_examples=300)
@given(
    sms=st.integers(1, 200),
    alignment=st.sampled_from([1, 2, 4, 8, 16]),
    minimum_steps=st.integers(1, 3),
    counts=st.lists(st.integers(1, 200) | st.integers(1, 40), min_size=1, max_size=4),
    scarce=st.sampled_from([None, 1, 16]),
    lack=st.sampled_from([(), ("cuGreenCtxStreamCreate",)]),
)
def test_any_split_is_disjoint_enough_and_aligned_but_for_one_remainder(
    sms, alignment, minimum_steps, counts, scarce, lack
):
    minimum = alignment * minimum_steps
    fake = FakeDriver(
        sms,
        (minimum, alignment),
        unbound=lack,
        most_groups=lambda size: 1 if scarce and size > scarce else sys.maxsize,
    )
    # SMs that would do if one part is the remainder: several groups are multiples of the minimum.
    step = alignment if len(counts) == 2 else minimum
    groups = [max(minimum, -(-count // step) * step) for count in counts]
    fits = [sum(groups) - groups[i] + counts[i] <= sms for i in range(len(counts))]
    try:
        device = device_with(fake)
        contexts = GreenContexts(device, device.split(counts))
    except ValueError:
        assert not any(fits)
    except GreenContextUnavailable:
        assert scarce or sms < minimum + alignment  # too small to see, or too small to split
    else:
        assert any(fits)
        parts = [fake.sms_of(stream) for stream in contexts.stream_handles]
        assert [len(part) for part in parts] == list(contexts.sms)
        assert all(got >= count for got, count in zip(contexts.sms, counts, strict=True))
        assert sum(contexts.sms) == len(frozenset().union(*parts)) <= sms
        unaligned = [i for i, got in enumerate(contexts.sms) if got % alignment or got < minimum]
        assert len(unaligned) <= 1
        if unaligned:  # the first for which it fits, and all that the others leave
            assert sum(contexts.sms) == sms
            assert unaligned[0] == fits.index(True)
        contexts.close()
    assert (fake.contexts, fake.streams, fake.current) == ({}, {}, [-1])


# Green contexts: what they own, and when it goes.


def contexts_with(fake: FakeDriver, *counts: int) -> GreenContexts:
    device = device_with(fake)
    return GreenContexts(device, device.split(counts))


def test_order_of_close():
    fake = FakeDriver()
    with contexts_with(fake, 36, 88, 8) as contexts:
        assert contexts.sms == (36, 88, 8)
        assert len(set(contexts.stream_handles)) == 3
        assert not contexts.closed
        fake.calls.clear()
    assert fake.calls == 3 * ["cuStreamSynchronize", "cuStreamDestroy", "cuGreenCtxDestroy"]
    contexts.close()
    assert len(fake.calls) == 9
    assert contexts.closed


@pytest.mark.parametrize("old", [{"unbound": ("cuGreenCtxStreamCreate",)}, {"version": 12040}])
def test_second_way_to_a_stream(old):
    fake = FakeDriver(**old)
    with contexts_with(fake, 40) as contexts:
        assert fake.sms_of(contexts.stream_handles[0]) == frozenset(range(40))
        assert fake.current == [-1]
        assert "cuStreamCreateWithPriority" in fake.calls
