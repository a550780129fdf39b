"""The file of results: whole lines are added and synced, so it is right whenever the job ends.

What the file holds is all that a job knows of an earlier run. A process that is killed within a
write leaves a torn last line at the most; it is cut off at the next start, and its request runs
again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nanovllm.batch.lines import Key

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
        self.path = path
        self.file: BinaryIO = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            self._lock()
            self.done, size = self._read(keys)
            self.file.truncate(size)
            self.file.seek(size)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()

    def append(self, results: Sequence[dict[str, Any]]) -> None:
        """Adds lines, which are on disk when this returns."""
        if results:
            self.file.write("".join(json.dumps(result) + "\n" for result in results).encode())
            self.file.flush()
            os.fsync(self.file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process writes its results there") from None

    def _read(self, keys: Collection[Key]) -> tuple[set[Key], int]:
        """The requests that have a result, and the bytes of the file up to a torn line."""
        done: set[Key] = set()
        size = 0
        for number, text in enumerate(self.file, start=1):
            where = f"{self.path}, line {number}"
            if not (text.startswith(START) or START.startswith(text)):
                raise ValueError(f"{where} is no result of a batch: name another file for them")
            if not text.endswith(b"\n"):
                break
            key = _key(text, where)
            if key not in keys or key in done:
                fault = "a second result" if key in done else "a result of another job"
                raise ValueError(f"{where} is {fault}: {key!r}")
            done.add(key)
            size += len(text)
        return done, size


def _key(text: bytes, where: str) -> Key:
    try:
        result = json.loads(text)
        custom_id = result["custom_id"]
        key = result["error"]["line"] if custom_id is None else custom_id
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{where} is damaged: {error!r}") from error
    if not isinstance(key, (str, int)):
        raise ValueError(f"{where} is damaged: it answers {key!r:.80}")
    return key
