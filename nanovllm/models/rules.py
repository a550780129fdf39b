"""Rules for the fields of config.json, and the error that a field out of its rule makes.

A value that is accepted means what it means to transformers; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanovllm.utils.options import short

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000
DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}
DTYPES |= {"float": "float32", "half": "float16"}


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something that this engine does not do, or its config is damaged."""


@dataclass(frozen=True)
class Rule:
    """What a field may hold."""

    allowed: str  # the words for it: "it must be ..."
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value  # normalises a value that is allowed

    def __or__(self, other: Rule) -> Rule:
        """What either allows."""
        return Rule(
            f"{self.allowed}, or {other.allowed}",
            lambda value: self.accepts(value) or other.accepts(value),
            lambda value: (self if self.accepts(value) else other).convert(value),
        )


REQUIRED: Any = object()

# Fields by name, each with its rule and the value of an absent one.
Fields = dict[str, tuple[Rule, Any]]


def check_fields(given: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """The value of every field, normalised; of an absent one, its default.

    Raises:
        UnsupportedModelError: one that is required is absent, or one has a value out of its rule.
    """
    values = {name: given.get(name, default) for name, (_, default) in fields.items()}
    for name, value in values.items():
        if value is REQUIRED:
            raise UnsupportedModelError(f"config.json: {name} is missing")
    return {name: check_field(name, values[name], rule) for name, (rule, _) in fields.items()}


def check_field(name: str, value: Any, rule: Rule, file: str = "config.json") -> Any:
    """The normalised value of a field of `file`."""
    if rule.accepts(value):
        return rule.convert(value)
    raise UnsupportedModelError(
        f"{file}: {name}={short(value)} is not supported: it must be {rule.allowed}"
    )


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether torch takes it as one, and so transformers: integers have 64 bits."""
    return isinstance(value, float) or (is_int(value) and -(2**63) <= value < 2**63)


def size(limit: int = MAX_SIZE) -> Rule:
    return Rule(
        f"a positive integer of at most {limit}", lambda value: is_int(value) and 0 < value <= limit
    )


def one_of(*values: Any) -> Rule:
    """These values, of their own type: 1 is not True."""
    allowed = [(type(value), value) for value in values]
    return Rule(" or ".join(map(repr, values)), lambda value: (type(value), value) in allowed)


def list_of(inner: Rule) -> Rule:
    return Rule(
        f"a list, each item {inner.allowed}",
        lambda value: isinstance(value, list) and all(map(inner.accepts, value)),
    )


def _ids(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


INTEGER = Rule("an integer", is_int)
SIZE = size()
EVEN_SIZE = Rule(
    "a positive integer and even, as rope needs it",
    lambda value: SIZE.accepts(value) and value % 2 == 0,
)
BOOLEAN = Rule("true or false", lambda value: isinstance(value, bool))
FALSE = Rule("false", lambda value: value is False)
NULL = Rule("null", lambda value: value is None)
# Where zero stands for none.
ZERO = Rule("zero", lambda value: is_number(value) and value == 0, lambda value: None)
# Numbers that float32 arithmetic can take.
POSITIVE = Rule(
    "a positive number, from 1e-30 to 1e30, or an integer below 2**63",
    lambda value: is_number(value) and 1e-30 <= value <= 1e30,
    float,
)
FRACTION = Rule(
    "a positive float of at most 1", lambda value: isinstance(value, float) and 0 < value <= 1
)
TOKEN_IDS = Rule(
    "an integer, a list of integers or null", lambda value: all(map(is_int, _ids(value))), _ids
)
DTYPE = Rule(
    f"one of {', '.join(DTYPES)}",
    lambda value: isinstance(value, str) and value in DTYPES,
    lambda value: DTYPES[value],
)
FLAT_OBJECT = Rule(
    "a flat object", lambda value: isinstance(value, dict) and dict not in map(type, value.values())
)
