"""The cache on disk: what was written comes back; whatever goes wrong is only a warning.

Damaged files and folders are in test_cache_attacks.py.
"""

import json
import logging
import os
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm.utils.disk_cache import DiskCache, cache_folder

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    SCALARS | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.dictionaries(st.text(), VALUES, max_size=4)


@pytest.fixture
def cache(tmp_path) -> DiskCache:
    return DiskCache("plans", tmp_path / "cache")


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(key=KEYS, value=VALUES)
def test_what_is_written_comes_back(tmp_path, key, value):
    cache = DiskCache("plans", tmp_path)
    cache.write(key, value)
    assert cache.read(key) == value
    assert DiskCache("plans", tmp_path).read(dict(reversed(key.items()))) == value


def test_keys_and_names_are_kept_apart(cache, caplog):
    other = DiskCache("others", cache.folder)
    cache.write({"torch": "2.11"}, 1)
    cache.write({"torch": "2.12"}, 2)
    other.write({"torch": "2.11"}, 3)
    assert [cache.read({"torch": v}) for v in ("2.11", "2.12", "2.13")] == [1, 2, None]
    assert other.read({"torch": "2.11"}) == 3
    assert not warnings(caplog)  # that something is not there yet is no fault


def test_a_later_value_replaces_an_earlier_one_and_leaves_no_other_file(cache):
    for value in range(3):
        cache.write({}, value)
    assert cache.read({}) == 2
    assert [path.name for path in cache.folder.iterdir()] == [cache.path({}).name]


def test_a_write_that_fails_keeps_the_old_value_and_leaves_nothing(cache, caplog, monkeypatch):
    def full(*_args):
        raise OSError("no space left on device")

    cache.write({}, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        cache.write({}, "new")
    assert cache.read({}) == "old"
    assert len(list(cache.folder.iterdir())) == 1
    assert "no space left" in warnings(caplog)[0]


@pytest.mark.parametrize("value", [{1, 2}, float("nan"), float("inf"), object()])
def test_what_is_not_json_is_the_callers_error(cache, value):
    with pytest.raises((TypeError, ValueError)):
        cache.write({}, value)
    assert not cache.path({}).exists()


def test_readers_never_see_a_part_of_a_value(cache, caplog):
    values = [[character] * 50_000 for character in "ab"]
    cache.write({}, values[0])
    done = threading.Event()

    def write() -> None:
        for turn in range(20):
            cache.write({}, values[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert cache.read({}) in values
    writer.join()
    assert not warnings(caplog)


def test_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "nano-vllm"
    for ignored in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / ".cache" / "nano-vllm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    cache = DiskCache("plans")
    cache.write({"a": 1}, 2)
    assert cache.read({"a": 1}) == 2
    written = json.loads(next((tmp_path / ".cache" / "nano-vllm").iterdir()).read_text())
    assert written == 2
