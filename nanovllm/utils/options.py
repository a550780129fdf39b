"""Checked options: errors name the field, its value and what is allowed.

A dataclass of options has a table of rules, one for each field. A rule takes a value and returns
it, perhaps normalised, or raises `ValueError` with the words for "what is allowed".
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from decimal import Decimal
from numbers import Real
from reprlib import Repr
from typing import Any, TypeVar

Rule = Callable[[Any], Any]
T = TypeVar("T")


def check(options: object, rules: Mapping[str, Rule], name: str, value: Any) -> Any:
    """Returns a value for field `name` of `options` as its rule normalises it.

    Raises:
        TypeError: there is no such field.
        ValueError: the value is not allowed.
    """
    if name not in rules:
        raise unknown(type(options), name)
    try:
        return rules[name](value)
    except ValueError as allowed:
        raise ValueError(f"{name}={short(value)} is not allowed: it must be {allowed}") from None


def hinting(cls: type[T]) -> type[T]:
    """Makes the error of a dataclass about an unknown option name the nearest valid one."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: T, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in cls.__dataclass_fields__:  # type: ignore[attr-defined]
                raise unknown(cls, name)
        init(self, *args, **options)

    cls.__init__ = __init__  # type: ignore[method-assign, assignment]
    return cls


def unknown(cls: Any, name: str) -> TypeError:
    """The error for an option that dataclass `cls` does not have."""
    nearest = nearest_name(name, [field.name for field in dataclasses.fields(cls)])
    hint = f"; the nearest valid one is {nearest!r}" if nearest else ""
    return TypeError(f"{cls.__name__} has no option {short(name)}{hint}")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant; None if all of them are about something else.

    That is one with few other letters, one with the same words and more or fewer of them, or one
    that begins like that.
    """
    if len(name) > 64:
        return None  # comparing takes the square of the time
    name = name.lower()
    words = set(name.split("_"))

    def similarity(other: str) -> float:
        return difflib.SequenceMatcher(None, name, other).ratio()

    def is_near(other: str) -> bool:
        others = set(other.split("_"))
        more = len(others) > 1 and others < words
        begins = len(name) > 2 and other.startswith(name)
        return words < others or more or begins or similarity(other) > 0.8

    return max(filter(is_near, known), key=similarity, default=None)


def short(value: object) -> str:
    """What `repr` says of a value, abridged; its type where that fails."""
    abridged = Repr()
    abridged.maxstring = abridged.maxother = abridged.maxlong = 80
    try:
        return abridged.repr(value)
    except Exception:  # out of the value's own methods, or an int of too many digits
        return f"<{type(value).__name__}>"


def plain(value: Any) -> Any:
    """Scalars of NumPy and torch, of no dimension, as Python values; others as they are."""
    return value.item() if getattr(value, "shape", None) == () else value


def whole(value: Any) -> int | None:
    """A whole number, whoever made it, as an int; None if it is none, as True and False are."""
    try:
        value = plain(value)
        # A tensor of one element and one dimension could be an index too.
        return None if isinstance(value, bool) or hasattr(value, "shape") else operator.index(value)
    except Exception:  # a value's own methods may raise anything
        return None


def real(value: Any) -> float | None:
    """A real number, whoever made it, as a float; None if it is none, as True and False are."""
    try:
        value = plain(value)
        if isinstance(value, (Real, Decimal)) and not isinstance(value, bool):
            return float(value)
        return None if (integer := whole(value)) is None else float(integer)
    except Exception:
        return None


def integer(minimum: int, also: int | None = None, multiple_of: int = 1) -> Rule:
    """Whole numbers from `minimum` up, multiples of `multiple_of`; `also` is one more value."""
    words = f"an integer of at least {minimum}"
    words += f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
    words += f", or {also}" if also is not None else ""

    def rule(value: Any) -> int:
        found = whole(value)
        if found is not None and (found == also or (found >= minimum and found % multiple_of == 0)):
            return found
        raise ValueError(words)

    return rule


def number(low: float, high: float, *, open_low: bool = False) -> Rule:
    """Numbers from `low` (excluded if `open_low`) to `high`."""

    def rule(value: Any) -> float:
        found = real(value)
        if found is not None and low <= found <= high and not (open_low and found == low):
            return found
        raise ValueError(f"a number {'above' if open_low else 'from'} {low:g} to {high:g}")

    return rule


def choice(*allowed: str) -> Rule:
    """One of the given strings."""

    def rule(value: Any) -> str:
        if isinstance(value, str) and value in allowed:
            return allowed[allowed.index(value)]
        raise ValueError("one of " + ", ".join(repr(word) for word in allowed))

    return rule


def boolean(value: Any) -> bool:
    """True or False, also NumPy's and torch's; nothing that merely counts as one."""
    with suppress(Exception):  # a value's own methods may raise anything
        if isinstance(truth := plain(value), bool):
            return truth
    raise ValueError("True or False")
