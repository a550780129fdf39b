"""The choice of a matrix product on a partition, with fake timers and a temporary cache."""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import replace

import pytest

from nanovllm.engine.dense_choice import DenseChoice, DenseChoices, DenseShape, implementations
from nanovllm.kernels.gemm_tunings import GemmTuning, candidates, predicted_us, tiles_to_cut
from nanovllm.utils.disk_cache import DiskCache

SHAPE = DenseShape(512, 4096, 4096, num_sms=96, dtype="bfloat16")
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}


class FakeTimer:
    """Random seconds for each implementation, the same whenever it is asked again."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[DenseShape, DenseChoice], float] = {}
        self.calls = 0

    def __call__(self, shape: DenseShape, choice: DenseChoice) -> float:
        self.calls += 1
        return self.seconds.setdefault((shape, choice), random.uniform(1e-5, 1e-3))


def choices(folder, timer, device="GPU", versions=VERSIONS):
    return DenseChoices(device, timer, versions, cache=DiskCache("dense", folder))


def entry(folder):
    (path,) = folder.glob("dense-*.json")
    return path


def test_takes_the_fastest(tmp_path):
    timer = FakeTimer()
    chosen = choices(tmp_path, timer).fastest(SHAPE)
    assert timer.seconds[SHAPE, chosen] == min(timer.seconds.values())
    assert {choice for _, choice in timer.seconds} == set(implementations(SHAPE))


@pytest.mark.parametrize("winner", implementations(SHAPE))
def test_any_implementation_can_win_and_is_kept(tmp_path, winner):
    def timer(shape, choice):
        return 1e-4 if choice == winner else 2e-4

    assert choices(tmp_path, timer).fastest(SHAPE) == winner
    assert choices(tmp_path, FakeTimer()).fastest(SHAPE) == winner


def test_times_a_shape_once(tmp_path):
    timer = FakeTimer()
    first = choices(tmp_path, timer)
    chosen = first.fastest(SHAPE)
    calls = timer.calls
    assert first.fastest(SHAPE) == chosen
    assert choices(tmp_path, timer).fastest(SHAPE) == chosen
    assert timer.calls == calls == len(implementations(SHAPE))


@pytest.mark.parametrize(
    "other",
    [
        {"rows": 256},
        {"features": 6144},
        {"inner": 12288},
        {"num_sms": 88},
        {"dtype": "float16"},
        {"gated": True},
    ],
)
def test_every_field_of_the_shape_counts(tmp_path, other):
    timer = FakeTimer()
    choices(tmp_path, timer).fastest(SHAPE)
    calls = timer.calls
    choices(tmp_path, timer).fastest(replace(SHAPE, **other))
    assert timer.calls > calls
    assert len(list(tmp_path.glob("dense-*.json"))) == 2


@pytest.mark.parametrize(
    "other", [{"device": "another GPU"}, {"versions": {**VERSIONS, "triton": "3.7.0"}}]
)
def test_another_device_or_version_is_timed_anew(tmp_path, other):
    timer = FakeTimer()
    choices(tmp_path, timer).fastest(SHAPE)
    calls = timer.calls
    choices(tmp_path, timer, **other).fastest(SHAPE)
    assert timer.calls == 2 * calls


def test_what_cannot_run_is_not_chosen(tmp_path):
    only = implementations(SHAPE)[-1]

    def timer(shape, choice):
        return 1.0 if choice == only else random.choice([math.inf, math.nan])

    assert choices(tmp_path, timer).fastest(SHAPE) == only


def test_cublas_if_nothing_can_be_timed(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        chosen = choices(tmp_path, lambda shape, choice: math.inf).fastest(SHAPE)
    assert chosen == DenseChoice("cublas")
    assert "could be timed" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        [],
        {},
        {"library": "cutlass", "tuning": None},
        {"library": "triton", "tuning": None},
        {"library": "triton", "tuning": {"block_m": 128}},
        {"library": "cublas", "tuning": {"block_m": 128}},
    ],
)
def test_a_foreign_value_is_timed_anew_and_rewritten(tmp_path, caplog, value):
    timer = FakeTimer()
    chosen = choices(tmp_path, timer).fastest(SHAPE)
    path = entry(tmp_path)
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "value": value}))
    calls = timer.calls
    with caplog.at_level(logging.WARNING):
        assert choices(tmp_path, timer).fastest(SHAPE) == chosen
    assert timer.calls == 2 * calls
    if value is not None:  # null is what a cache says of a key that it does not have
        assert "not a choice" in caplog.text
    assert json.loads(path.read_text()) == stored


@pytest.mark.parametrize(
    "wrong", [{"block_m": "128"}, {"stream_k": 1}, {"num_warps": True}, {"more": 1}]
)
def test_a_wrong_tuning_is_timed_anew(tmp_path, caplog, wrong):
    timer = FakeTimer()
    shape = replace(SHAPE, num_sms=8)  # where there is Triton only
    chosen = choices(tmp_path, timer).fastest(shape)
    path = entry(tmp_path)
    stored = json.loads(path.read_text())
    tuning = {**stored["value"]["tuning"], **wrong}
    path.write_text(json.dumps({**stored, "value": {**stored["value"], "tuning": tuning}}))
    with caplog.at_level(logging.WARNING):
        assert choices(tmp_path, timer).fastest(shape) == chosen
    assert "not a choice" in caplog.text
    assert json.loads(path.read_text()) == stored


def test_a_damaged_file_is_timed_anew_and_rewritten(tmp_path, caplog):
    timer = FakeTimer()
    chosen = choices(tmp_path, timer).fastest(SHAPE)
    path = entry(tmp_path)
    stored = path.read_text()
    path.write_text(stored[: random.randrange(len(stored))])
    with caplog.at_level(logging.WARNING):
        assert choices(tmp_path, timer).fastest(SHAPE) == chosen
    assert "cannot be read" in caplog.text
    assert path.read_text() == stored


@pytest.mark.parametrize("num_sms", [1, 8, 15, 16, 96])
def test_no_library_on_a_small_partition(num_sms):
    libraries = {choice.library for choice in implementations(replace(SHAPE, num_sms=num_sms))}
    assert libraries == ({"cublas", "cublaslt", "triton"} if num_sms >= 16 else {"triton"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"features": -1}, "features is -1"),
        ({"inner": 0}, "inner is 0"),
        ({"num_sms": 0}, "num_sms is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"features": 7, "gated": True}, "features is 7"),
    ],
)
def test_refused_shapes(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SHAPE, **wrong)


# ------------------------------------------------------------------------------- the tunings


@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("hopper", [True, False])
def test_candidates_are_few_distinct_and_fit(element_size, hopper):
    for _ in range(50):
        rows, num_sms = random.randint(1, 2048), random.randint(1, 148)
        features, inner = (64 * random.randint(1, 400) for _ in range(2))
        found = candidates(
            rows, features, inner, num_sms, element_size=element_size, hopper=hopper, limit=12
        )
        assert 1 <= len(found) <= 12
        assert len(set(found)) == len(found)
        guesses = [predicted_us(rows, features, inner, num_sms, t, element_size) for t in found]
        assert guesses == sorted(guesses)
        for t in found:
            staged = (t.block_m + t.block_n) * t.block_k * element_size * t.num_stages
            assert staged <= (200 if hopper else 160) * 1024
            assert hopper or not t.tma


def test_stream_k_where_the_last_round_is_nearly_empty():
    # 97 tiles of 128 x 256 on 96 SMs: a second round for one tile.
    best = candidates(128, 97 * 256, 4096, 96)[0]
    assert best.stream_k


def test_no_stream_k_where_tiles_divide_evenly():
    best = candidates(512, 24576, 4096, 96)[0]
    assert (best.block_m, best.block_n, best.stream_k) == (128, 256, False)


def test_more_rounds_take_longer():
    tuning = GemmTuning(128, 128, 64, num_warps=8, num_stages=3)
    at_96, at_95 = (predicted_us(128, 96 * 128, 16384, sms, tuning) for sms in (96, 95))
    assert at_95 == pytest.approx(2 * at_96)
    cut = predicted_us(128, 96 * 128, 16384, 95, replace(tuning, stream_k=True))
    assert at_96 < cut < at_95


def test_cut_tiles_leave_whole_rounds_and_few_pieces():
    for _ in range(200):
        tiles, programs = random.randint(1, 600), random.randint(1, 148)
        cut = tiles_to_cut(tiles, programs)
        assert 0 <= cut <= tiles
        assert (tiles - cut) % programs == 0
        if cut > 0 and programs < tiles:
            assert 2 * cut >= programs  # a tile is in three shares at most


@pytest.mark.parametrize("name", ["rows", "features", "inner", "num_sms", "limit"])
def test_candidates_refuse_sizes_under_1(name):
    sizes = {"rows": 1, "features": 1, "inner": 1, "num_sms": 1, "limit": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        candidates(**sizes)
