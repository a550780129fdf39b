"""Interrupts at a chosen line: what Ctrl-C does, but at the same place every time."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any


class Interrupt(KeyboardInterrupt):
    """An interrupt of a test's own, as opposed to the user's."""


class InterruptAt:
    """Within `with`, raises Interrupt at line event number `lines` of the files below `paths`.

    `left` is above 0 as long as nothing was interrupted.
    """

    def __init__(self, lines: int, paths: Iterable[str]) -> None:
        self.left = lines
        self.paths = tuple(paths)

    def __call__(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(self.paths):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                raise Interrupt
        return self

    def __enter__(self) -> None:
        self.before = sys.gettrace()
        sys.settrace(self)

    def __exit__(self, *exc_info: object) -> None:
        sys.settrace(self.before)
