"""Rules for the fields of config.json, and the error that a field out of its rule makes.

A value that is accepted means what it means to transformers; anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanovllm.utils.options import Rule, check_value, integer, real, whole

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000
DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}
DTYPES |= {"float": "float32", "half": "float16"}


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something that this engine does not do, or its config is damaged."""


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


def check_field(
    name: str, value: Any, rule: Callable[[Any], Any], file: object = "config.json"
) -> Any:
    """The normalised value of a field of `file`."""
    try:
        return check_value(name, value, rule)
    except ValueError as error:
        raise UnsupportedModelError(f"{file}: {error}") from None


def _float(value: Any) -> float | None:
    """To torch, and so to transformers, integers have 64 bits."""
    return None if isinstance(value, int) and abs(value) >= 2**63 else real(value)


def _ids(value: Any) -> list[Any]:
    listed = value if isinstance(value, list) else [] if value is None else [value]
    return list(map(whole, listed))


INTEGER = integer()
SIZE = integer(1, MAX_SIZE)
EVEN_SIZE = integer(2, MAX_SIZE, multiple_of=2)  # as rope needs it
# Numbers that float32 arithmetic can take.
POSITIVE = Rule(
    "a positive number, from 1e-30 to 1e30, or an integer below 2**63",
    lambda value: value is not None and 1e-30 <= value <= 1e30,
    _float,
)
# Where zero stands for none.
ABSENT = Rule(
    "zero or None",
    lambda value: value is None,
    lambda value: None if _float(value) == 0 else value,
)
FRACTION = Rule(
    "a positive float of at most 1", lambda value: isinstance(value, float) and 0 < value <= 1
)
TOKEN_IDS = Rule("an integer, a list of integers or None", lambda ids: None not in ids, _ids)
DTYPE = Rule(
    f"one of {', '.join(DTYPES)}",
    bool,
    lambda value: DTYPES.get(value) if isinstance(value, str) else None,
)
FLAT_OBJECT = Rule(
    "a flat object", lambda value: isinstance(value, dict) and dict not in map(type, value.values())
)
# Of all layers: each attends to all positions.
LAYER_TYPES = Rule(
    "a list, each item 'full_attention' or 'attention'",
    lambda value: (
        isinstance(value, list) and all(kind in ("full_attention", "attention") for kind in value)
    ),
)
