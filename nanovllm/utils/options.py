"""Checked values: errors name the field, its value and what is allowed.

A rule takes a value and returns it, perhaps normalised, or raises `ValueError` with the words for
"what is allowed". A field of a dataclass of options is an `option` with a rule.
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

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

# Iterable, but in no order, or not of what they seem to hold.
NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, Set)


def option(default: Any, rule: Callable[[Any], Any]) -> Any:
    """A field of a dataclass."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def rule_of(cls: type, name: str) -> Callable[[Any], Any]:
    """The rule of field `name` of a dataclass; raises TypeError if it has no such field."""
    fields = cls.__dataclass_fields__  # type: ignore[attr-defined]
    if name in fields:
        return fields[name].metadata["rule"]
    nearest = difflib.get_close_matches(name.lower(), fields, n=1, cutoff=0.7)
    hint = f"; the nearest valid one is {nearest[0]!r}" if nearest else ""
    raise TypeError(f"{cls.__name__} has no option {short(name)}{hint}")


def check_value(name: str, value: Any, rule: Callable[[Any], Any]) -> Any:
    """A value, normalised; the ValueError of one that is not allowed calls it `name`."""
    try:
        return rule(value)
    except ValueError as allowed:
        raise ValueError(f"{name}={short(value)} is not allowed: it must be {allowed}") from None


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


def real(value: Any) -> float | None:
    """A number, whoever made it, as a float; None if it is none, or too large for one."""
    value = plain(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value)
    return None


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a value may be, in words and as a test of what `read` makes of it."""

    words: str
    accepts: Callable[[Any], bool]
    read: Callable[[Any], Any] = plain
    other: Rule | None = None  # what else it may be

    def __call__(self, value: Any) -> Any:
        rule: Rule | None = self
        while rule is not None:
            found = rule.read(value)
            if rule.accepts(found):
                return found
            rule = rule.other
        raise ValueError(self.words)

    def __or__(self, other: Rule) -> Rule:
        """What either allows."""
        rest = other if self.other is None else self.other | other
        return dataclasses.replace(self, words=f"{self.words} or {other.words}", other=rest)


def integer(minimum: float = -math.inf, maximum: float = math.inf, multiple_of: int = 1) -> Rule:
    """Whole numbers in a range, multiples of `multiple_of`."""
    words = "an integer"
    if maximum < math.inf:
        words += f" from {minimum} to {maximum}"
    elif minimum > -math.inf:
        words += f" of at least {minimum}"
    words += f" and a multiple of {multiple_of}" if multiple_of > 1 else ""
    return Rule(
        words,
        lambda n: n is not None and minimum <= n <= maximum and n % multiple_of == 0,
        whole,
    )


def number(low: float, high: float, *, open_low: bool = False) -> Rule:
    """Numbers from `low` (excluded if `open_low`) to `high`."""
    return Rule(
        f"a number {'above' if open_low else 'from'} {low:g} to {high:g}",
        lambda x: x is not None and low <= x <= high and not (open_low and x == low),
        real,
    )


def choice(*allowed: Any) -> Rule:
    """One of the given values, of its own type: 1 is not True."""
    words = ", ".join(map(repr, allowed))
    return Rule(
        f"one of {words}" if len(allowed) > 1 else words,
        lambda value: any(type(value) is type(each) and value == each for each in allowed),
        lambda value: plain(value) if as_text(value) is None else as_text(value),
    )


# Nothing that merely counts as true or false.
BOOLEAN = Rule("True or False", lambda value: isinstance(value, bool))
TEXT = Rule("a text that is not empty", bool, as_text)
NONE = Rule("None", lambda value: value is None)
