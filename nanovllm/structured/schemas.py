"""JSON schemas of which xgrammar enforces every keyword; all others are refused, by name and place.

xgrammar ignores what it does not know, and some of what it knows where it stands beside something
else. So nothing is handed on: a schema is translated, keyword by keyword of the tables below, into
one that xgrammar takes to the letter. A translation may allow less than the schema (objects have no
properties but those that are named), never more.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from nanovllm.structured.patterns import MAX_STATES, string_pattern

MAX_TEXT = 2**16
# xgrammar reads numbers as 64 bits, and compares decimal digits.
MAX_INTEGER = 2**63 - 1
MAX_BOUND, DECIMALS = 1e9, 6
MAX_MULTIPLE = 1024

ANNOTATIONS = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$schema",
        "$defs",
        "definitions",
    ]
)
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
# What a schema may consist of instead of a type, and the keywords that may stand beside it.
COMPOSED: dict[str, tuple[str, ...]] = {
    "$ref": (), "const": ("type",), "enum": ("type",), "anyOf": (), "allOf": (),
    "oneOf": ("discriminator",),
}  # fmt: skip
# Each pair of groups excludes one another: xgrammar enforces the one and not the other.
_EXCLUSIVE = [
    (("pattern",), ("format", "minLength", "maxLength")),
    (("format",), ("minLength", "maxLength")),
    (("multipleOf",), _BOUNDS),
]
# Characters that JSON does not escape; xgrammar's own lengths count others, too.
_CHARACTER = "[ !#-\\[\\]-~\x80-\ud7ff\ue000-\U0010ffff]"
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


def check_schema(value: Any) -> str | None:
    """A rule for options: a schema as JSON text, whether it came as text or as a dict."""
    if value is None:
        return None
    if not isinstance(value, (str, Mapping)):
        raise ValueError("a JSON schema, as a dict or as JSON text")
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) > MAX_TEXT:
            raise ValueError(f"its text is longer than {MAX_TEXT} characters")
        schema = json.loads(text, parse_int=_integer, parse_constant=_no_number)
        translate(schema)
        json.dumps(schema, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("a JSON schema of whole characters, without lone surrogates") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"a JSON schema that can be enforced; {error}") from None
    except RecursionError:
        raise ValueError("a JSON schema that is not nested as deeply") from None
    return json.dumps(schema)


def translate(schema: Any) -> dict[str, Any]:
    """The schema for xgrammar; ValueError names the first keyword that would not be enforced."""
    return _Translator(schema).translated


class _Translator:
    def __init__(self, root: Any) -> None:
        self.root = root
        self.names: dict[str, str] = {}  # of references in the translation
        self.definitions: dict[str, Any] = {}
        self.count = 0
        body = self.schema(root, "#")
        self.translated = {**body, "$defs": self.definitions} if self.names else body

    def schema(self, schema: Any, place: str) -> dict[str, Any]:
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise ValueError(f"{place} is {schema!r:.40}, which is no schema that a value can meet")
        names = [name for name in COMPOSED if name in schema][:1]
        if names:
            self.only(schema, names, COMPOSED[names[0]], place)
            return self.composed(names[0], schema, place)
        kinds = self.types(schema, place)
        self.only(schema, ["type"], [name for kind in kinds for name in KEYWORDS[kind]], place)
        parts = [self.typed(kind, schema, place) for kind in kinds]
        return {"anyOf": parts} if len(parts) > 1 else parts[0] if parts else {}

    def only(self, schema: dict, names: list[str], more: Any, place: str) -> None:
        """Refuses keywords but these and annotations."""
        allowed = {*names, *more, *ANNOTATIONS, *(["$id"] if place == "#" else [])}
        for keyword in schema:
            if keyword not in allowed:
                known = any(keyword in keywords for keywords in KEYWORDS.values())
                if known and names == ["type"] and "type" not in schema:
                    _refuse(keyword, place, "is enforced beside a type only")
                _refuse(
                    keyword, place, f"is not enforced; known there: {', '.join([*names, *more])}"
                )

    def types(self, schema: dict, place: str) -> list[str]:
        kinds = schema.get("type", [])
        if "type" not in schema:  # or any value may be meant
            of = [
                kind for kind in ("object", "array") if not schema.keys().isdisjoint(KEYWORDS[kind])
            ]
            return of[:1]
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not kinds or not all(isinstance(kind, str) and kind in KEYWORDS for kind in kinds):
            _refuse("type", place, f"must be among {', '.join(KEYWORDS)}")
        return list(dict.fromkeys(kinds))

    def composed(self, keyword: str, schema: dict, place: str) -> dict[str, Any]:
        value, here = schema[keyword], f"{place}/{keyword}"
        if keyword == "$ref":
            return self.reference(value, place)
        if keyword in ("const", "enum"):
            values = [value] if keyword == "const" else value
            kinds = self.types(schema, place) if "type" in schema else list(KEYWORDS)
            fitting = [v for v in _list(values, here) if any(_is(v, kind) for kind in kinds)]
            if not fitting:
                raise ValueError(f"{here} has no value of the type beside it")
            return self.unlike({"enum": fitting})
        parts = [self.schema(part, f"{here}/{i}") for i, part in enumerate(_list(value, here))]
        if keyword == "allOf":
            if len(parts) > 1:
                _refuse(keyword, place, "is enforced with a single part only")
            return parts[0]
        if keyword == "oneOf" and not all(
            self.disjoint(one, other) for i, one in enumerate(value) for other in value[:i]
        ):
            _refuse(keyword, place, "has parts that may hold at once; anyOf may do")
        return {"anyOf": parts}

    def reference(self, reference: Any, place: str) -> dict[str, Any]:
        target = self.resolve(reference, place)
        if reference not in self.names:
            name = self.names[reference] = f"d{len(self.names)}"
            self.definitions[name] = self.schema(target, reference)
        return {"$ref": f"#/$defs/{self.names[reference]}"}

    def resolve(self, reference: Any, place: str) -> Any:
        target = self.root
        if not isinstance(reference, str) or not re.fullmatch("#(/[^~%]*)?", reference):
            _refuse("$ref", place, "must be # or #/..., without ~ and %")
        for part in reference[1:].split("/")[1:]:
            if not isinstance(target, dict) or part not in target:
                _refuse("$ref", place, f"points to {reference}, which is not there")
            target = target[part]
        return target

    def typed(self, kind: str, schema: dict, place: str) -> dict[str, Any]:
        own = {name: schema[name] for name in KEYWORDS[kind] if name in schema}
        for ones, others in _EXCLUSIVE:
            for one in ones:
                for other in others:
                    if one in own and other in own:
                        _refuse(other, place, f"is not enforced beside {one}")
        if kind == "string":
            return self.shared({"type": kind, **_string(own, place)})
        if kind in ("integer", "number"):
            return {"type": kind, **{n: _bound(v, n, kind, place) for n, v in own.items()}}
        if kind == "array":
            return self.array(own, place)
        return self.object(own, place) if kind == "object" else {"type": kind}

    def array(self, own: dict[str, Any], place: str) -> dict[str, Any]:
        result: dict[str, Any] = {"type": "array", **_counts(own, ("minItems", "maxItems"), place)}
        if "prefixItems" in own:
            here = f"{place}/prefixItems"
            parts = _list(own["prefixItems"], here)
            result["prefixItems"] = [self.schema(p, f"{here}/{i}") for i, p in enumerate(parts)]
        items = own.get("items", "prefixItems" not in own)
        result["items"] = items and self.schema(items, f"{place}/items")
        return result

    def object(self, own: dict[str, Any], place: str) -> dict[str, Any]:
        limits = ("minProperties", "maxProperties")
        result: dict[str, Any] = {"type": "object", **_counts(own, limits, place)}
        properties, further = own.get("properties", {}), own.get("additionalProperties", True)
        if not isinstance(properties, dict):
            _refuse("properties", place, "must be an object")
        required = own.get("required", [])
        if not isinstance(required, list) or not all(name in properties for name in required):
            _refuse("required", place, "must be a list of names in properties")
        if properties:
            if not isinstance(further, bool):
                _refuse("additionalProperties", place, "is not enforced beside properties")
            further = False
        elif result.get("minProperties", 0) > 1:
            _refuse("minProperties", place, "is not enforced above 1 without properties")
        result["properties"] = {
            name: self.schema(part, f"{place}/properties/{name}")
            for name, part in properties.items()
        }
        result["required"] = required
        result["additionalProperties"] = further and self.schema(
            further, f"{place}/additionalProperties"
        )
        return self.unlike(result)

    def shared(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A reference to it: xgrammar takes long for patterns, and compiles equal ones anew."""
        name = self.names.setdefault(json.dumps(schema), f"d{len(self.names)}")
        self.definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}

    def unlike(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Tells it from others: xgrammar takes two for one that differ in a key like "title"."""
        self.count += 1
        return {**schema, "unlike": self.count}

    def disjoint(self, one: Any, other: Any, depth: int = 4) -> bool:
        """Whether clearly no value meets both of two schemas, which have been checked."""
        one, other = (self.follow(part) for part in (one, other))
        if not depth or not isinstance(one, dict) or not isinstance(other, dict):
            return False
        values = [_values(part) for part in (one, other)]
        if None not in values:
            return not any(_equal(a, b) for a in values[0] or () for b in values[1] or ())
        kinds = [{"number" if k == "integer" else k for k in _kinds(part)} for part in (one, other)]
        if kinds[0] and kinds[1] and not kinds[0] & kinds[1]:
            return True
        if kinds != [{"object"}] * 2:
            return False
        common = set(one.get("required", ())) & set(other.get("required", ()))
        return any(
            self.disjoint(one["properties"][name], other["properties"][name], depth - 1)
            for name in common
        )

    def follow(self, schema: Any) -> Any:
        for _ in range(8):  # they may go round in a circle
            if isinstance(schema, dict) and "$ref" in schema:
                schema = self.resolve(schema["$ref"], "#")
        return schema


def _refuse(keyword: str, place: str, reason: str) -> NoReturn:
    raise ValueError(f"{keyword!r} at {place} {reason}")


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} must be a list of at least one entry")
    return value


def _counts(own: dict[str, Any], names: tuple[str, ...], place: str) -> dict[str, int]:
    for name in names:
        count = own.get(name, 0)
        if type(count) is not int or not 0 <= count < 2**31:
            _refuse(name, place, "must be an integer from 0 to 2**31 - 1")
    return {name: own[name] for name in names if name in own}


def _string(own: dict[str, Any], place: str) -> dict[str, str]:
    lengths = _counts(own, ("minLength", "maxLength"), place)
    if lengths:
        low, high = lengths.get("minLength", 0), lengths.get("maxLength", "")
        if max(low, high or 0) <= MAX_STATES:  # as for this form xgrammar takes less time
            return {"pattern": string_pattern(f"^.{{{low},{high}}}$")}
        return {"pattern": f"^{_CHARACTER}{{{low},{high}}}$"}
    if "format" in own:
        if own["format"] not in FORMATS:
            _refuse("format", place, f"is not enforced but for {', '.join(FORMATS)}")
        return {"pattern": f"^{FORMATS[own['format']]}$"}
    if "pattern" in own:
        if not isinstance(own["pattern"], str):
            _refuse("pattern", place, "must be a text")
        try:
            return {"pattern": string_pattern(own["pattern"])}
        except ValueError as allowed:
            _refuse("pattern", place, f"must be {allowed}")
    return {}


def _bound(value: Any, name: str, kind: str, place: str) -> int | float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _refuse(name, place, "must be a number")
    if name == "multipleOf":
        if value != int(value) or not 1 <= value <= MAX_MULTIPLE:
            _refuse(name, place, f"must be an integer from 1 to {MAX_MULTIPLE}")
        return int(value)
    if kind == "integer":
        # Of a fraction the next integer means the same.
        if name in ("minimum", "exclusiveMaximum"):
            return math.ceil(value)
        return math.floor(value)
    if abs(value) > MAX_BOUND or round(value, DECIMALS) != value:
        _refuse(name, place, f"must have {DECIMALS} decimals and be at most {MAX_BOUND:g} in size")
    return value


def _values(schema: dict[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _kinds(schema: dict[str, Any]) -> list[str]:
    if _values(schema) is not None:
        return [kind for kind in KEYWORDS if any(_is(v, kind) for v in _values(schema) or ())]
    kinds = schema.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _is(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a type; a whole float is an integer, too."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    classes = {"string": str, "integer": int, "number": int, "array": list, "object": dict}
    return kind in classes and isinstance(value, classes[kind])


def _equal(one: Any, other: Any) -> bool:
    """Whether two JSON values may be the same; true and 1 are not."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _integer(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise ValueError(f"{digits:.40} has more than 64 bits")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
