"""What may lie in a cache folder, or in place of it: generated, each under a name.

An attack gets the file that the cache will look for, with a good text in it, and spoils it.
"""

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

Attack = Callable[[Path], object]

# Spelled as in JSON; each takes the place of something in a good file.
SPELLINGS = (
    *("NaN", "-NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e308", "1e-320", "-1", "0"),
    *("-0.0", "1.5", "true", "null", '""', '"1"', '"NaN"', "[]", "{}", "[[]]", '{"a": 1}'),
    *("9" * 400, "9" * 100_000, "9" * 400 + ".5", '"\\ud800"', "[" * 50_000 + "]" * 50_000),
)
PLACE, TIME = "[[0, 128, 128, ", "0.00128128]"
# What a good file says, and the same with a place for a spelling.
PLACES = {
    "sample": (PLACE + TIME, "[{}"),
    "plan": (PLACE + TIME, "[[{}, 128, 128, " + TIME),
    "size": (PLACE + TIME, "[[0, {}, 128, " + TIME),
    "tokens": (PLACE + TIME, "[[0, 128, {}, " + TIME),
    "seconds": (PLACE + TIME, PLACE + "{}]"),
}
RIGHT = (("seconds", "1.5"), ("plan", "0"), ("plan", "-0.0"))  # or may be
TABLES = {
    "unknown plan": (PLACE, "[[2, 128, 128, 0.001], " + PLACE[1:]),
    "unknown size": (PLACE, "[[0, 96, 96, 0.001], " + PLACE[1:]),
    "a place of two numbers": (PLACE, "[[0, 128, " + TIME[:-1] + "], " + PLACE[1:]),
    "a place of four numbers": (PLACE, "[[0, 0, 128, 128, "),
    "a missing time": (PLACE + TIME + ", ", "["),
    "too many tokens": (PLACE, "[[0, 128, 12800000, "),
    "no multiple of the size": (PLACE, "[[0, 128, 129, "),
    "a place twice, first slower": (PLACE, PLACE + "0.002], " + PLACE[1:]),
    "a time that is a text": (PLACE, '["12", ' + PLACE[1:]),
}
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "null bytes": lambda good: bytes(100),
    "more than is read": lambda good: bytes(5 << 20),
    "byte order mark": lambda good: b"\xef\xbb\xbf" + good[:-1],
    "UTF-16": lambda good: good.decode()[:-1].encode("utf-16"),
    "not UTF-8": lambda good: good[:20] + b"\xff\xfe\x80" + good[20:],
    "cut off": lambda good: good[: len(good) // 2],
    "twice": lambda good: good + good,
    "a mapping": lambda good: b'{"a": ' + good + b"}",
    "in a list": lambda good: b"[" + good + b"]",
    "a number": lambda good: b"1",
    "null": lambda good: b"null",
    "deep": lambda good: b"[" * 1_000_000,
    "deep behind a place": lambda good: good[:20] + b"[" * 1_000_000,
}


def full_directory(path: Path) -> None:
    path.mkdir()
    (path / "occupied").write_text("by somebody")


def listening_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


SPECIAL: dict[str, Attack] = {
    "nothing": lambda path: None,
    "fifo": os.mkfifo,
    "directory": Path.mkdir,
    "full directory": full_directory,
    "socket": listening_socket,
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to its folder": lambda path: path.symlink_to("."),
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to /dev/full": lambda path: path.symlink_to("/dev/full"),
    "link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
    "sparse file": sparse,
    "forbidden file": lambda path: (path.write_text("{}"), path.chmod(0)),
    "unwritable file": lambda path: (path.write_text("{}"), path.chmod(0o400)),
    "forbidden directory": lambda path: path.mkdir(mode=0),
    "unwritable directory": lambda path: path.mkdir(mode=0o500),
}


def replace(old: str, new: str, file: Path) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def make_instead(make: Attack, of_folder: bool, file: Path) -> None:
    """Something else at the path of the file, or of its folder."""
    file.unlink()
    if of_folder:
        file.parent.rmdir()
    make(file.parent if of_folder else file)


def attacks() -> dict[str, Attack]:
    """All attacks after which the table must be measured again."""
    found: dict[str, Attack] = {}
    for name, (old, new) in PLACES.items():
        for spelling in SPELLINGS:
            if (name, spelling) not in RIGHT:
                text = new.replace("{}", spelling, 1)
                found[f"{name}={spelling[:12]}({len(spelling)})"] = partial(replace, old, text)
    for name, (old, new) in TABLES.items():
        found[f"table: {name}"] = partial(replace, old, new)
    for name, spoil in CONTENTS.items():
        found[f"content: {name}"] = lambda file, spoil=spoil: file.write_bytes(  # type: ignore[misc]
            spoil(file.read_bytes())
        )
    for name, make in SPECIAL.items():
        found[f"file: {name}"] = partial(make_instead, make, False)
        found[f"folder: {name}"] = partial(make_instead, make, True)
    return found
