"""What a calibration measures, what it leaves out, and what it hands on."""

from pathlib import Path
from typing import Any

import pytest
import torch

import green_ctx
import nanovllm
from nanovllm.config import Config
from nanovllm.engine.auto.calibration import (
    Calibration,
    calibration_key,
    measured_sizes,
    pipelined_sizes,
    tokens_to_measure,
)
from nanovllm.engine.auto.chooser import plans_to_try, splits_to_try
from nanovllm.engine.auto.planner import LEAST_GAIN
from nanovllm.engine.plan import SEQUENTIAL, Plan
from nanovllm.utils.disk_cache import DiskCache
from tests.simulated_gpu import SILLY, Gpu

PLANS = [SEQUENTIAL, *plans_to_try(132)]
GPU = Gpu()
Timed = list[tuple[int, int, int]]


def calibrate(
    folder: Path, plans: list[Plan] = PLANS, largest: int = 512, **more: int
) -> tuple[Calibration, list[list[int]], Timed]:
    """A calibration of the simulated GPU, the sizes at which plans pay, and what was timed."""
    timed: Timed = []

    def timer(plan: int, size: int, tokens: int) -> float:
        timed.append((plan, size, tokens))
        return GPU.seconds(plans[plan], size, tokens)

    options = {"capacity": 2_000_000, "max_len": 4096} | more
    calibration = Calibration(
        timer, largest, key={"device": "fake"}, cache=DiskCache("plans", folder), **options
    )
    return calibration, calibration.run(plans, show_progress=False), timed


def test_a_second_engine_measures_nothing(tmp_path):
    first, sizes, timed = calibrate(tmp_path)
    assert timed
    again, same_sizes, nothing = calibrate(tmp_path)
    assert not nothing
    assert same_sizes == sizes
    for plan in range(len(PLANS)):
        assert again.table.curves(plan) == first.table.curves(plan)
    # Somewhat less memory is no reason to measure again, other plans or sizes are.
    assert not calibrate(tmp_path, capacity=1_999_000)[2]
    assert calibrate(tmp_path, largest=256)[2]
    assert calibrate(tmp_path, plans=PLANS[:3])[2]


def test_plans_pay_where_they_gain_somewhere_and_no_place_is_measured_twice(tmp_path):
    calibration, sizes, timed = calibrate(tmp_path, largest=1024)
    assert len(timed) == len(set(timed)) < 115
    assert sizes[0] == []
    assert any(1024 in paying for paying in sizes)
    for plan, paying in enumerate(sizes):
        for size in paying:
            gains = [
                calibration.table.seconds(0, size, size * context)
                / calibration.table.seconds(plan, size, size * context)
                for context in range(1, 2000, 10)
            ]
            assert max(gains) >= LEAST_GAIN


@pytest.mark.parametrize(("largest", "max_len"), [(100, 4096), (512, 4)])
def test_where_nothing_can_be_gained_no_pipeline_is_measured(tmp_path, largest, max_len):
    _, sizes, timed = calibrate(tmp_path, largest=largest, max_len=max_len)
    assert {plan for plan, *_ in timed} <= {0}
    assert not any(sizes)


def test_a_silly_split_is_measured_once(tmp_path):
    _, sizes, timed = calibrate(tmp_path, plans=[SEQUENTIAL, SILLY, *PLANS[1:]])
    assert [plan for plan, *_ in timed].count(1) == 1
    assert sizes[1] == []
    assert any(sizes)


def test_a_perfect_overlap_gains_where_attention_and_dense_work_balance():
    # 10 of dense work, a token of attention takes 0.01: both halves' 12 are met at 1200 tokens.
    def places(longest: int, halves: float = 12.0) -> list[int]:
        return tokens_to_measure(8, longest, 10.0, 10.0 + 0.01 * (longest - 8), halves)

    assert set(places(200)) == set()  # 12 of sequential decode, which two halves take alone
    assert 240 in places(240)
    everywhere = places(10_000)
    assert all(tokens % 8 == 0 for tokens in everywhere)
    assert min(everywhere) == pytest.approx(400, rel=0.02)
    assert sorted(everywhere)[-2:] == [2400, 10_000]
    assert 400 < everywhere[0] < 2400
    assert tokens_to_measure(8, 8, 1.0, 1.0, 1.0) == []


@pytest.mark.parametrize("largest", [1, 127, 128, 200, 512, 513, 1024, 3000])
def test_sizes(largest):
    sizes, measured = pipelined_sizes(largest), measured_sizes(largest)
    assert set(measured) <= set(sizes)
    assert sizes == sorted(set(sizes))
    assert bool(sizes) == bool(measured) == (largest >= 128)
    if sizes:
        assert max(measured) == max(sizes) == largest
        assert min(measured) == min(sizes) >= 128


@pytest.mark.parametrize("sms", range(16, 200, 2))
def test_splits_fill_the_device_with_multiples_of_8(sms):
    splits = splits_to_try(sms)
    assert len(splits) == len(set(splits)) >= 1
    for attention, ffn in splits:
        assert attention > 0
        assert ffn > 0
        assert ffn % 8 == 0
        assert attention + ffn == sms


def test_splits_of_a_device_that_is_known():
    assert splits_to_try(132) == [(28, 104), (36, 96), (44, 88), (52, 80), (60, 72)]
    assert splits_to_try(0) == []


def test_calibrations_are_of_the_code_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(green_ctx, "__file__", str(tmp_path / "green_ctx.py"))
    monkeypatch.setattr(nanovllm, "__path__", [str(tmp_path / "nanovllm")])
    (tmp_path / "nanovllm" / "kernels").mkdir(parents=True)
    sources = ["green_ctx.py", "nanovllm/config.py", "nanovllm/kernels/norm.py"]
    for source in sources:
        (tmp_path / source).write_text("a = 1", encoding="utf-8")

    def key() -> dict[str, Any]:
        return calibration_key(Config(), torch.device("cuda", 0))

    before = key()
    (tmp_path / "nanovllm" / "norm.pyc").write_text("compiled", encoding="utf-8")
    assert key() == before
    for source in sources:
        (tmp_path / source).write_text("a = 2", encoding="utf-8")
        assert key() != before
        (tmp_path / source).write_text("a = 1", encoding="utf-8")
    assert key() == before
