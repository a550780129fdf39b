"""The keywords of JSON schema that xgrammar 0.2.8 enforces, and what may stand in them."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from nanovllm.structured.patterns import MAX_STATES, string_pattern

# Bounds of numbers: xgrammar compares their decimal digits, to the sixth place.
MAX_BOUND, DECIMALS = 1e9, 6
MAX_MULTIPLE = 1024

ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$comment", "$schema", "$defs", "definitions",
}  # fmt: skip
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
KEYWORDS: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": (*_BOUNDS, "multipleOf"),
    "number": _BOUNDS,
    "boolean": (),
    "null": (),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": (
        "properties", "required", "additionalProperties", "minProperties", "maxProperties"
    ),
}  # fmt: skip
# What a schema may have in the place of its type's keywords, and what may stand beside it.
COMPOSED: dict[str, tuple[str, ...]] = {
    "$ref": (), "const": ("type",), "enum": ("type",), "anyOf": (), "allOf": (),
    "oneOf": ("discriminator",),
}  # fmt: skip
# Of a keyword those that are not enforced beside it.
EXCLUDED: dict[str, tuple[str, ...]] = {
    "pattern": ("format", "minLength", "maxLength"),
    "format": ("minLength", "maxLength"),
    "multipleOf": _BOUNDS,
}
# Months have their days, but for leap years.
_DATE = (
    r"[1-9]\d{3}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+\-]([01]\d|2[0-3]):[0-5]\d)"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
# A character that JSON does not escape; in strings with a length xgrammar itself lets in others.
_CHARACTER = "[ !#-\\[\\]-~\x80-\ud7ff\ue000-\U0010ffff]"


def refuse(keyword: str, place: str, reason: str) -> NoReturn:
    raise ValueError(f"{keyword!r} at {place} {reason}")


def check_beside(keywords: dict[str, Any], place: str) -> None:
    """Refuses keywords that are enforced, but not beside one another."""
    for keyword, others in EXCLUDED.items():
        for other in others:
            if keyword in keywords and other in keywords:
                refuse(other, place, f"is not enforced beside {keyword}")


def entries(value: Any, place: str) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} must be a list of at least one entry")
    return value


def counts(keywords: dict[str, Any], names: tuple[str, ...], place: str) -> dict[str, int]:
    """Those of these names that are there: lengths and numbers of items."""
    for name in names:
        count = keywords.get(name, 0)
        if type(count) is not int or not 0 <= count < 2**31:
            refuse(name, place, "must be an integer from 0 to 2**31 - 1")
    return {name: keywords[name] for name in names if name in keywords}


def string(keywords: dict[str, Any], place: str) -> dict[str, str]:
    """All keywords of a string as a pattern."""
    lengths = counts(keywords, ("minLength", "maxLength"), place)
    if lengths:
        repeated = f"{{{lengths.get('minLength', 0)},{lengths.get('maxLength', '')}}}"
        if max(lengths.values()) <= MAX_STATES:  # for this form xgrammar takes less time
            return {"pattern": string_pattern(f"^.{repeated}$")}
        return {"pattern": f"^{_CHARACTER}{repeated}$"}
    if "format" in keywords:
        if keywords["format"] not in FORMATS:
            refuse("format", place, f"is not enforced but for {', '.join(FORMATS)}")
        return {"pattern": f"^{FORMATS[keywords['format']]}$"}
    if "pattern" in keywords:
        if not isinstance(keywords["pattern"], str):
            refuse("pattern", place, "must be a text")
        try:
            return {"pattern": string_pattern(keywords["pattern"])}
        except ValueError as allowed:
            refuse("pattern", place, f"must be {allowed}")
    return {}


def bound(value: Any, name: str, kind: str, place: str) -> int | float:
    """A bound of a number or an integer, or `multipleOf`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        refuse(name, place, "must be a number")
    if name == "multipleOf":
        if value != int(value) or not 1 <= value <= MAX_MULTIPLE:
            refuse(name, place, f"must be an integer from 1 to {MAX_MULTIPLE}")
        return int(value)
    if kind == "integer":  # of a fraction the next integer means the same
        return math.ceil(value) if name in ("minimum", "exclusiveMaximum") else math.floor(value)
    if abs(value) > MAX_BOUND or round(value, DECIMALS) != value:
        refuse(name, place, f"must have {DECIMALS} decimals and be at most {MAX_BOUND:g} in size")
    return value
