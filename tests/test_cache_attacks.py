"""Whatever lies in the cache folder costs a warning and a calibration, and nothing more."""

import gc
import logging
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm.engine.auto.calibration import Calibration
from nanovllm.engine.plan import GREEN, SEQUENTIAL
from nanovllm.utils.disk_cache import DiskCache
from tests.cache_attacks import attacks

pytestmark = pytest.mark.timeout(100)  # none may hang

ATTACKS = attacks()


def calibrate(folder: Path | None) -> tuple[Calibration, int]:
    """A calibration against a made-up GPU, and how many steps it measured."""
    measured: list[tuple[int, int, int]] = []

    def timer(plan: int, size: int, tokens: int) -> float:
        measured.append((plan, size, tokens))
        dense, attention = 1e-5 * size, 1e-8 * tokens
        return max(dense, attention) if plan else dense + attention

    cache = DiskCache("plans", folder)
    calibration = Calibration(timer, 128, 520_000, 4096, {"device": "fake"}, cache)
    calibration.run([SEQUENTIAL, GREEN.with_sms((16, 96))], show_progress=False)
    return calibration, len(measured)


def times(calibration: Calibration) -> list[object]:
    return [calibration.table.curves(plan) for plan in (0, 1)]


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    """The file of a calibration that was kept."""
    folder = tmp_path / "cache"
    calibrate(folder)
    (path,) = folder.iterdir()
    yield path
    for place in (folder, path):  # or else nobody can clear them away
        if place.is_dir() and not place.is_symlink():
            place.chmod(0o700)


def open_files() -> set[str]:
    """All of this process, but for those that garbage, as of tests before, still holds."""
    gc.collect()
    return set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()


def writable(folder: Path) -> bool:
    """Whether a folder is there, or can be made, and takes files."""
    try:
        folder.mkdir(exist_ok=True)
        (folder / "probe").write_text("")
        (folder / "probe").unlink()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_costs_a_calibration(attack, file, caplog):
    clean, steps = calibrate(file.parent.parent / "clean")
    before = open_files()
    ATTACKS[attack](file)
    attacked, measured = calibrate(file.parent)
    assert times(attacked) == times(clean)
    assert measured == steps
    assert len(caplog.records) <= 2  # of reading and of writing
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert all(len(message) < 500 for message in caplog.messages)
    if writable(file.parent):
        caplog.clear()
        again, measured = calibrate(file.parent)
        assert (times(again), measured) == (times(clean), 0)
        cache = DiskCache("plans", file.parent)
        cache.write({"a": 1}, [2.5])
        assert cache.read({"a": 1}) == [2.5]
        assert not caplog.records
    assert open_files() == before


def test_flipped_bits_never_give_a_table_that_cannot_be(file, caplog):
    good = file.read_bytes()
    for seed in range(200):
        rng, data = random.Random(seed), bytearray(good)
        for _ in range(1 + seed % 3):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
        table = calibrate(file.parent)[0].table
        for plan in (0, 1):
            assert list(table.curves(plan)) == [128]
            assert 0 < table.seconds(plan, 128, 10**6) < math.inf


@pytest.mark.parametrize(
    "folder", ["\0", "x" * 300, "\ud800", "/dev/null/cache", "/proc/cache", "/dev/null"]
)
def test_a_folder_that_cannot_be_costs_two_warnings(folder, caplog):
    assert calibrate(Path(folder))[1] > 0
    assert len(caplog.records) == 2 if "/proc" not in folder else 1


def test_a_home_that_is_none_costs_two_warnings(monkeypatch, caplog):
    def no_home() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert calibrate(None)[1] > 0
    monkeypatch.setattr(Path, "home", no_home)
    assert calibrate(None)[1] > 0
    assert len(caplog.records) == 4
