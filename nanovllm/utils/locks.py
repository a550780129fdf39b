"""A call under a lock that no interrupt can leave locked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def exclusive(
    lock: threading.RLock, function: Callable[P, T], *args: P.args, **options: P.kwargs
) -> T:
    """Returns what `function` returns, called while this thread holds `lock`.

    NOTE: an exception at the end of a `with` block, out of a signal handler or a tracer, can come
    before the lock is released. Then all other threads would wait for good.
    """
    if lock._is_owned():  # type: ignore[attr-defined]
        return function(*args, **options)
    try:
        with lock:
            return function(*args, **options)
    finally:
        while lock._is_owned():  # type: ignore[attr-defined]
            lock.release()
