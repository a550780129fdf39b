"""The file of results: whole lines are added and synced, so it is right whenever the job ends.

What the file holds is all that a job knows of an earlier run. A process that is killed within a
write leaves a torn last line at the most; it is cut off at the next start, and its request runs
again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nanovllm.batch.lines import Key
from nanovllm.utils.options import short

START = b'{"id": "batch_req_'  # of every line


class Results:
    """The results in a file, which this process alone adds to until `close`.

    Args:
        path: a new file, or one of an earlier run of the same job.
        keys: of the job's requests.

    Raises:
        ValueError: another process has the file open, or it is no file of this job's results;
            then it is left as it is.
        OSError: it cannot be read or written.
    """

    def __init__(self, path: Path, keys: Collection[Key]) -> None:
        with ExitStack() as on_error:
            self.file = on_error.enter_context(path.open("a+b"))
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path}: another process writes its results there") from None
            self.file.seek(0)
            self.done, self.errors, size = read_done(path, self.file, keys)
            self.file.truncate(size)
            on_error.pop_all()

    def close(self) -> None:
        self.file.close()

    def append(self, results: Sequence[dict[str, Any]]) -> None:
        """Adds lines, which are on disk when this returns."""
        self.errors += sum(result["error"] is not None for result in results)
        if results:
            self.file.write("".join(json.dumps(result) + "\n" for result in results).encode())
            self.file.flush()
            os.fsync(self.file.fileno())


def read_done(
    path: Path, file: Iterable[bytes], keys: Collection[Key]
) -> tuple[set[Key], int, int]:
    """The requests that have a result, how many are errors, and the bytes up to a torn line."""
    done: set[Key] = set()
    errors = size = 0
    for number, text in enumerate(file, start=1):
        where = f"{path}, line {number}"
        if not (text.startswith(START) or START.startswith(text)):
            raise ValueError(f"{where} is no result of a batch: name another file for them")
        if not text.endswith(b"\n"):
            break
        key, is_error = _key(text, where)
        if key not in keys or key in done:
            fault = "a second result" if key in done else "a result of another job"
            raise ValueError(f"{where} is {fault}: {key!r}")
        done.add(key)
        errors += is_error
        size += len(text)
    return done, errors, size


def _key(text: bytes, where: str) -> tuple[Key, bool]:
    """What a result answers, and whether it is an error."""
    try:
        result = json.loads(text)
        custom_id = result["custom_id"]
        error = result.get("error")
        key = error["line"] if custom_id is None else custom_id
    except (ValueError, LookupError, TypeError, AttributeError) as fault:
        raise ValueError(f"{where} is damaged: {fault!r}") from fault
    if not isinstance(key, (str, int)):
        raise ValueError(f"{where} is damaged: it answers {short(key)}")
    return key, error is not None
