"""Checked options: a rule a field, and errors that name field, value and what is allowed.

`Config` and `SamplingParams` declare each field as `option(default, rule)`. A rule takes a value
and returns it, perhaps normalised, or raises `ValueError` with the words for "what is allowed".
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any

Rule = Callable[[Any], Any]


def option(default: Any, rule: Rule) -> Any:
    """A dataclass field whose values pass through `rule`."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def check_value(owner: type, name: str, value: Any) -> Any:
    """Returns `value` as the rule of field `name` of dataclass `owner` normalises it."""
    rule: Rule = next(f for f in dataclasses.fields(owner) if f.name == name).metadata["rule"]
    try:
        return rule(value)
    except ValueError as allowed:
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}") from None


def check_names(owner: type, names: Iterable[str]) -> None:
    """Raises TypeError for the first name that is no field of dataclass `owner`."""
    known = [f.name for f in dataclasses.fields(owner)]
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(
                f"{owner.__name__} has no option {name!r}; the nearest valid one is {nearest!r}"
            )


def is_int(value: object) -> bool:
    """Whether `value` is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def integer(minimum: int, also: int | None = None, multiple_of: int = 1) -> Rule:
    """Whole numbers from `minimum` up, multiples of `multiple_of`; `also` is one more value."""
    words = f"an integer of at least {minimum}"
    words += f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
    words += f", or {also}" if also is not None else ""

    def rule(value: Any) -> int:
        fits = is_int(value) and value >= minimum and value % multiple_of == 0
        if fits or (is_int(value) and value == also):
            return int(value)
        raise ValueError(words)

    return rule


def number(low: float, high: float, *, open_low: bool = False) -> Rule:
    """Numbers from `low` (excluded if `open_low`) to `high`."""

    def rule(value: Any) -> float:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if real and low <= value <= high and not (open_low and value == low):
            return float(value)
        raise ValueError(f"a number {'above' if open_low else 'from'} {low:g} to {high:g}")

    return rule


def choice(*allowed: str) -> Rule:
    """One of the given strings."""

    def rule(value: Any) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        raise ValueError("one of " + ", ".join(repr(word) for word in allowed))

    return rule


def boolean(value: Any) -> bool:
    """True or False, nothing that merely counts as one."""
    if isinstance(value, bool):
        return value
    raise ValueError("True or False")
