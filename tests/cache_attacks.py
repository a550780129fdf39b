"""What may lie in a cache folder, or in place of it: generated, each under a name.

An attack gets the file that the cache will look for, with a good text in it, and spoils it.
"""

from __future__ import annotations

import os
import random
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Attack = Callable[[Path], None]

# Spelled as in JSON; each takes the place of something in a good file.
SPELLINGS = (
    *("NaN", "-NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "1e-320", "-1", "0"),
    *("-0.0", "1.5", "true", "null", '""', '"1"', '"NaN"', "[]", "{}", "[[]]", '{"a": 1}'),
    *("9" * 400, "9" * 100_000, "9" * 400 + ".5", '"\\ud800"', "[" * 50_000 + "]" * 50_000),
)


def replaced(old: str, new: str) -> Attack:
    def attack(file: Path) -> None:
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new, 1))

    return attack


def content(data: bytes | Callable[[bytes], bytes]) -> Attack:
    return lambda file: file.write_bytes(
        data if isinstance(data, bytes) else data(file.read_bytes())
    )


def instead(make: Callable[[Path], object], *, of_folder: bool) -> Attack:
    """Something else is made at the path of the file, or of its folder."""

    def attack(file: Path) -> None:
        file.unlink()
        if of_folder:
            file.parent.rmdir()
        make(file.parent if of_folder else file)

    return attack


def full_directory(path: Path) -> None:
    path.mkdir()
    (path / "occupied").write_text("by somebody")


def listening_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_suffix(".fifo"))
    path.symlink_to(path.with_suffix(".fifo"))


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "fifo": os.mkfifo,
    "link to a fifo": link_to_fifo,
    "directory": Path.mkdir,
    "full directory": full_directory,
    "socket": listening_socket,
    "dangling link": link_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to /dev/zero": link_to("/dev/zero"),
    "link to /dev/null": link_to("/dev/null"),
    "link to /dev/full": link_to("/dev/full"),
    "link to /dev/ptmx": link_to("/dev/ptmx"),
    "link to /": link_to("/"),
    "link to /proc/self/mem": link_to("/proc/self/mem"),
    "link to /proc/self/pagemap": link_to("/proc/self/pagemap"),
    "link to its folder": link_to("."),
    "sparse file": sparse,
    "5 MiB of zeros": lambda path: path.write_bytes(bytes(5 << 20)),
    "forbidden file": lambda path: (path.write_text("{}"), path.chmod(0)),
    "unwritable file": lambda path: (path.write_text("{}"), path.chmod(stat.S_IRUSR)),
    "forbidden directory": lambda path: path.mkdir(mode=0),
    "unwritable directory": lambda path: path.mkdir(mode=0o500),
}


def contents() -> Iterator[tuple[str, bytes | Callable[[bytes], bytes]]]:
    rng = random.Random(7)
    yield "empty", b""
    yield "null bytes", bytes(100)
    yield "byte order mark", lambda good: b"\xef\xbb\xbf" + good[:-1]
    yield "UTF-16", lambda good: good.decode()[:-1].encode("utf-16")
    yield "not UTF-8", lambda good: good[:20] + b"\xff\xfe\x80" + good[20:]
    yield "twice", lambda good: good + good
    yield "another field", lambda good: good[:-1] + b', "more": 1}'
    yield "in a list", lambda good: b"[" + good + b"]"
    yield "no value", b'{"key": {}}'
    yield "no key", b'{"value": {}}'
    for opening in (b"[", b'{"key": [', b'{"key": {}, "value":['):
        yield f"deep {opening.decode()}", opening + b"[" * 1_000_000
    for number in range(10):
        yield f"cut off {number}", lambda good, n=number: good[: len(good) * n // 10]  # type: ignore[misc]
        yield f"random {number}", rng.randbytes(rng.randint(1, 300))


def attacks() -> dict[str, Attack]:
    """All attacks after which the table must be measured again."""
    found: dict[str, Attack] = {}
    place, time = "[[0, 128, 128, ", "0.00128128]"
    places = {
        "key": ('"fake"', "{}"),
        "value": ('"value": [', '"value": {}, "x": ['),
        "sample": (place + time, "[{}"),
        "plan": (place + time, "[[{}, 128, 128, " + time),
        "size": (place + time, "[[0, {}, 128, " + time),
        "tokens": (place + time, "[[0, 128, {}, " + time),
        "seconds": (place + time, place + "{}]"),
    }
    for name, (old, new) in places.items():
        for spelling in SPELLINGS:
            if (name, spelling) in (("seconds", "1.5"), ("plan", "0"), ("plan", "-0.0")):
                continue  # which is right, or may be
            text = new.replace("{}", spelling, 1)
            found[f"{name}={spelling[:12]}({len(spelling)})"] = replaced(old, text)
    for name, data in contents():
        found[f"content: {name}"] = content(data)
    for name, make in SPECIAL.items():
        found[f"file: {name}"] = instead(make, of_folder=False)
        if name != "link to /":  # into which some users may write
            found[f"folder: {name}"] = instead(make, of_folder=True)
    for name, old, new in (
        ("unknown plan", place, "[[2, 128, 128, 0.001], " + place[1:]),
        ("unknown size", place, "[[0, 96, 96, 0.001], " + place[1:]),
        ("a place of two numbers", place, "[[0, 128, " + time[:-1] + "], " + place[1:]),
        ("a place of four numbers", place, "[[0, 0, 128, 128, "),
        ("a missing time", place + time + ", ", "["),
        ("too many tokens", place, "[[0, 128, 12800000, "),
        ("no multiple of the size", place, "[[0, 128, 129, "),
        ("a place twice, first slower", place, place + "0.002], " + place[1:]),
        ("a time that is a text", place, '["12", ' + place[1:]),
        ("a mapping", '"value": [', '"value": {"a": 1}, "x": ['),
    ):
        found[f"table: {name}"] = replaced(old, new)
    return found


@contextmanager
def flipped_bits(file: Path, count: int, seed: int) -> Iterator[None]:
    """The file with a few bits changed, which may go unnoticed; whole again afterwards."""
    good = file.read_bytes()
    rng, data = random.Random(seed), bytearray(good)
    for _ in range(count):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    yield
    file.write_bytes(good)
