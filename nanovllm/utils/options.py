"""Checked options: errors name the field, its value and what is allowed.

A field of a dataclass of options is an `option` with a rule. A rule takes a value and returns it,
perhaps normalised, or raises `ValueError` with the words for "what is allowed".
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from reprlib import Repr
from typing import Any, TypeVar

Rule = Callable[[Any], Any]
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# Iterable, but in no order, or not of what they seem to hold.
NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, Set)


def option(default: Any, rule: Rule) -> Any:
    """A field of a dataclass."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def rule_of(cls: type, name: str) -> Rule:
    """The rule of field `name` of a dataclass; raises TypeError if it has no such field."""
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    if name in fields:
        return fields[name].metadata["rule"]
    nearest = difflib.get_close_matches(name.lower(), fields, n=1, cutoff=0.7)
    hint = f"; the nearest valid one is {nearest[0]!r}" if nearest else ""
    raise TypeError(f"{cls.__name__} has no option {short(name)}{hint}")


def check(cls: type, name: str, value: Any, called: str | None = None) -> Any:
    """A value for field `name` of a dataclass, normalised; ValueError if it is not allowed.

    `called`: its name where it was given; default: the same.
    """
    rule = rule_of(cls, name)
    try:
        return rule(value)
    except ValueError as allowed:
        given = f"{called or name}={short(value)}"
        raise ValueError(f"{given} is not allowed: it must be {allowed}") from None


def hinting(cls: type[T]) -> type[T]:
    """Makes the error of a dataclass about an unknown option name the nearest valid one."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self: T, /, *args: Any, **options: Any) -> None:
        for name in options:
            rule_of(cls, name)
        init(self, *args, **options)

    cls.__init__ = __init__  # type: ignore[method-assign, assignment]
    return cls


def taking(cls: type) -> Callable[[F], F]:
    """Shows the fields of a dataclass in signature and help of a function that takes them as `**`.

    Type checkers need a TypedDict in addition; a test compares the two.
    """

    def show(function: F) -> F:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        fields = [
            field.replace(kind=field.KEYWORD_ONLY)
            for name, field in inspect.signature(cls).parameters.items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*own, *fields]
        )
        text = f"Options, the fields of `{cls.__name__}`:\n{_attributes(cls)}"
        function.__doc__ = "\n\n".join(filter(None, [inspect.getdoc(function), text]))
        return function

    return show


def meanings(cls: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each field."""
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", _attributes(cls), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _attributes(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]


class _Abridged(Repr):
    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)
        except ValueError:  # Python refuses to print more than some thousand digits
            return f"<an integer of {x.bit_length()} bits>"


def short(value: object) -> str:
    """What `repr` says of a value, abridged."""
    abridged = _Abridged()
    abridged.maxstring = abridged.maxother = abridged.maxlong = 80
    return abridged.repr(value)


def as_list(value: Any) -> list[Any] | None:
    """The elements of a list, an array, a tensor or an iterator; None if it is none of them."""
    if isinstance(value, NO_LISTS):
        return None
    value = value.tolist() if hasattr(value, "tolist") else value  # of no dimension: a scalar
    return list(value) if isinstance(value, Iterable) and not isinstance(value, NO_LISTS) else None


def token_ids(value: Any) -> list[int] | None:
    """The token ids in a list or the like; None if it holds anything but integers."""
    ids = as_list(value)
    # A call per token would keep the GPU waiting for a long prompt.
    if ids is None or set(map(type, ids)) <= {int}:
        return ids
    whole_ids = [whole(token) for token in ids]
    return None if None in whole_ids else whole_ids  # type: ignore[return-value]


def plain(value: Any) -> Any:
    """Scalars of NumPy and torch, of no dimension, as Python values; others as they are."""
    return value.item() if getattr(value, "shape", None) == () else value


def as_text(value: Any) -> str | None:
    """A text, whoever made it, as a str; None if it is none."""
    value = plain(value)
    # Not by `str`, which gives the name of an enum's member.
    return str.__str__(value) if isinstance(value, str) else None


def whole(value: Any) -> int | None:
    """A whole number, whoever made it, as an int; None if it is none, as True and False are."""
    value = plain(value)
    # A tensor of one element and one dimension could be an index too.
    if isinstance(value, bool) or hasattr(value, "shape"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(
    minimum: int, also: int | None = None, multiple_of: int = 1, maximum: float = math.inf
) -> Rule:
    """Whole numbers in a range, multiples of `multiple_of`; `also` is one more value."""
    words = f"an integer of at least {minimum}"
    words += f" and at most {maximum}" if maximum < math.inf else ""
    words += f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
    words += f", or {also}" if also is not None else ""

    def rule(value: Any) -> int:
        found = whole(value)
        if found is not None and (
            found == also or (minimum <= found <= maximum and found % multiple_of == 0)
        ):
            return found
        raise ValueError(words)

    return rule


def number(low: float, high: float, *, open_low: bool = False) -> Rule:
    """Numbers from `low` (excluded if `open_low`) to `high`."""

    def rule(value: Any) -> float:
        found = plain(value)
        is_number = isinstance(found, (int, float)) and not isinstance(found, bool)
        if is_number and low <= found <= high and not (open_low and found == low):
            with suppress(OverflowError):
                return float(found)
        raise ValueError(f"a number {'above' if open_low else 'from'} {low:g} to {high:g}")

    return rule


def choice(*allowed: str) -> Rule:
    """One of the given strings."""

    def rule(value: Any) -> str:
        found = as_text(value)
        if found in allowed:
            return found
        raise ValueError("one of " + ", ".join(map(repr, allowed)))

    return rule


def boolean(value: Any) -> bool:
    """True or False, also NumPy's and torch's; nothing that merely counts as one."""
    truth = plain(value)
    if isinstance(truth, bool):
        return truth
    raise ValueError("True or False")
