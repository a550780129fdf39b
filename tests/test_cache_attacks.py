"""Whatever lies in the cache folder costs a warning and a calibration, and nothing more."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.engine.calibration import Calibration
from nanovllm.utils.disk_cache import DiskCache
from tests.cache_attacks import attacks, flipped_bits

pytestmark = pytest.mark.timeout(10)  # none may hang

ATTACKS = attacks()


class NamedPlan(str):
    """Stands for a plan, of which calibration reads the name only."""

    @property
    def name(self) -> str:
        return str(self)


def calibrate(folder: Path | None) -> tuple[Calibration, int]:
    """A calibration against a made-up GPU, and how many steps it measured."""
    measured: list[tuple[int, int]] = []

    def timer(way: float, size: int, tokens: int) -> float:
        measured.append((size, tokens))
        dense, attention = 0.001, 1e-8 * tokens
        return max(dense, attention) if way else dense + attention

    plans: Any = [NamedPlan("sequential"), NamedPlan("green 16+96")]
    cache = DiskCache("plans", folder)
    calibration = Calibration(timer, 128, 500_000, 4096, 0.0, {"device": "fake"}, cache)  # type: ignore[arg-type]
    calibration.run(plans, show_progress=False)
    return calibration, len(measured)


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


def test_there_are_enough_attacks() -> None:
    assert len(ATTACKS) >= 300


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_costs_a_calibration(attack: str, file: Path, caplog: Any) -> None:
    clean, steps = calibrate(file.parent.parent / "clean")
    before = open_files()
    ATTACKS[attack](file)
    attacked, measured = calibrate(file.parent)
    assert attacked.table.to_json() == clean.table.to_json()
    assert measured == steps
    assert len(caplog.records) <= 2  # of reading and of writing
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert all(len(message) < 500 for message in caplog.messages)
    if writable(file.parent):
        caplog.clear()
        again, measured = calibrate(file.parent)
        assert (again.table.to_json(), measured) == (clean.table.to_json(), 0)
        cache = DiskCache("plans", file.parent)
        cache.write({"a": 1}, [2.5])
        assert cache.read({"a": 1}) == [2.5]
        assert not caplog.records
    assert open_files() == before


def test_a_good_file_is_read(file: Path) -> None:
    assert calibrate(file.parent)[1] == 0


def test_flipped_bits_never_give_a_table_that_cannot_be(file: Path, caplog: Any) -> None:
    for seed in range(200):
        with flipped_bits(file, 1 + seed % 3, seed):
            table = calibrate(file.parent)[0].table
        assert table.batches("sequential") == [64, 128]
        for plan in table.plans:
            for size in table.batches(plan):
                assert 0 < (table.predict(plan, size, 10**6) or math.inf) < math.inf


@pytest.mark.parametrize(
    "folder", ["\0", "x" * 300, "\ud800", "/dev/null/cache", "/proc/cache", "/dev/null"]
)
def test_a_folder_that_cannot_be_costs_two_warnings(folder: str, caplog: Any) -> None:
    assert calibrate(Path(folder))[1] > 0
    assert len(caplog.records) == 2 if "/proc" not in folder else 1


def test_a_home_that_is_none_costs_two_warnings(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert calibrate(None)[1] > 0
    assert len(caplog.records) == 2
