"""The keywords of JSON schema that xgrammar 0.2.8 enforces, and what may stand in them."""

from __future__ import annotations

import math
from typing import Any, NoReturn

from nanovllm.structured.patterns import string_pattern

# Bounds of numbers: xgrammar compares their decimal digits, to the sixth place.
MAX_BOUND, DECIMALS = 1e9, 6

ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly",
    "$comment", "$schema", "$defs", "definitions",
}  # fmt: skip
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
# By type.
KEYWORDS: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": _BOUNDS,
    "number": _BOUNDS,
    "boolean": (),
    "null": (),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties", "maxProperties"),
}
# How Python's parser reads the values of a type.
CLASSES: dict[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,),
    "null": (type(None),), "array": (list,), "object": (dict,),
}  # fmt: skip
# What a schema may have in the place of its type's keywords, and what may stand beside it.
COMPOSED: dict[str, tuple[str, ...]] = {
    "$ref": (), "const": ("type",), "enum": ("type",), "anyOf": (), "allOf": (),
    "oneOf": ("discriminator",),
}  # fmt: skip
# A character that JSON does not escape. Written like this, it is compiled and followed faster where
# there may be many, and slower where there are few.
_CHARACTER = "[ !#-\\[\\]-~\x80-\ud7ff\ue000-\U0010ffff]"
MANY_CHARACTERS = 100
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


def refuse(keyword: str, place: str, reason: str) -> NoReturn:
    raise ValueError(f"{keyword!r} at {place} {reason}")


def entries(value: Any, place: str) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} must be a list of at least one entry")
    return value


def counts(keywords: dict[str, Any], names: tuple[str, ...], place: str) -> dict[str, int]:
    """Those of these names that are there: lengths and numbers of items."""
    found = {name: keywords[name] for name in names if name in keywords}
    for name, count in found.items():
        if type(count) is not int or not 0 <= count < 2**31:
            refuse(name, place, "must be an integer from 0 to 2**31 - 1")
    return found


def pattern(keywords: dict[str, Any], place: str) -> str:
    """What all keywords of a string mean; "" if there are none."""
    lengths = counts(keywords, ("minLength", "maxLength"), place)
    given = [name for name in ("pattern", "format") if name in keywords]
    if given and (others := [*given[1:], *lengths]):
        refuse(others[0], place, f"is not enforced beside {given[0]}")
    if lengths:  # xgrammar itself lets in characters that JSON escapes
        repeated = f"{{{lengths.get('minLength', 0)},{lengths.get('maxLength', '')}}}"
        is_long = max(lengths.values()) > MANY_CHARACTERS
        return f"^{_CHARACTER}{repeated}$" if is_long else string_pattern(f"^.{repeated}$")
    if "format" in keywords:
        if keywords["format"] not in FORMATS:
            refuse("format", place, f"is not enforced but for {', '.join(FORMATS)}")
        return f"^{FORMATS[keywords['format']]}$"
    text = keywords.get("pattern", "")
    if not isinstance(text, str):
        refuse("pattern", place, "must be a text")
    try:
        return string_pattern(text)
    except ValueError as allowed:
        refuse("pattern", place, f"must be {allowed}")


def bound(value: Any, name: str, kind: str, place: str) -> int | float:
    """A bound of a number or an integer."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        refuse(name, place, "must be a number")
    if kind == "integer":  # of a fraction the next integer means the same
        return math.ceil(value) if name in ("minimum", "exclusiveMaximum") else math.floor(value)
    if abs(value) > MAX_BOUND or round(value, DECIMALS) != value:
        refuse(name, place, f"must have {DECIMALS} decimals and be at most {MAX_BOUND:g} in size")
    return value
