"""JSON schemas of which xgrammar enforces every keyword; all others are refused, by name and place.

xgrammar ignores what it does not know, and some of what it knows where it stands beside something
else. So nothing is handed on: a schema is translated, keyword by keyword of the tables below, into
one that xgrammar takes to the letter. A translation may allow less than the schema (objects have no
properties but those that are named), never more.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from nanovllm.structured.patterns import string_pattern
from nanovllm.utils.options import short

MAX_TEXT = 2**16
MAX_INTEGER = 2**63 - 1
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


def check_schema(value: Any) -> str | None:
    """A rule for options: a schema as JSON text, whether it came as text or as a dict."""
    if value is None:
        return None
    if not isinstance(value, (str, Mapping)):
        raise ValueError("a JSON schema, as a dict or as JSON text")
    try:
        text = value if isinstance(value, str) else json.dumps(dict(value))
        if len(text) > MAX_TEXT:
            raise ValueError(f"its text is longer than {MAX_TEXT} characters")
        schema = json.loads(text, parse_int=_integer)
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
        translate(schema)
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
        self.count = 0
        self.patterns: dict[str, str] = {}  # names of definitions by what they match
        self.one_of: list[tuple[str, object, list[dict[str, Any]]]] = []
        # What references may point to, and how xgrammar is told of it.
        targets = {"#": root}
        for keyword in ("$defs", "definitions"):
            schemas = root.get(keyword, {}) if isinstance(root, dict) else {}
            if not isinstance(schemas, dict):
                refuse(keyword, "#", "must be an object")
            names = [name for name in schemas if set(name).isdisjoint("/~%")]
            targets |= {f"#/{keyword}/{name}": schemas[name] for name in names}
        self.names = {target: f"d{i}" for i, target in enumerate(targets)}
        self.definitions: dict[str, Any] = {}
        for target, schema in targets.items():
            self.definitions[self.names[target]] = self.schema(schema, target)
        for alternatives in self.one_of:
            self.check_tags(*alternatives)
        self.translated = {"$ref": "#/$defs/d0", "$defs": self.definitions}

    def schema(self, schema: Any, place: str) -> dict[str, Any]:
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise ValueError(
                f"{place} is {short(schema)}, which is no schema that a value can meet"
            )
        for keyword, beside in COMPOSED.items():
            if keyword in schema:
                check_known(schema, [keyword, *beside], place)
                return self.composed(keyword, schema, place)
        kinds = types(schema, place)
        known = ["type", *dict.fromkeys(name for kind in kinds for name in KEYWORDS[kind])]
        check_known(schema, known, place)
        parts = [self.typed(kind, schema, place) for kind in kinds]
        return {"anyOf": parts} if len(parts) > 1 else parts[0] if parts else {}

    def schemas(self, values: Any, place: str) -> list[dict[str, Any]]:
        return [self.schema(each, f"{place}/{i}") for i, each in enumerate(entries(values, place))]

    def composed(self, keyword: str, schema: dict[str, Any], place: str) -> dict[str, Any]:
        value, here = schema[keyword], f"{place}/{keyword}"
        if keyword == "$ref":
            name = self.names.get(value) if isinstance(value, str) else None
            if name is None:
                refuse(keyword, place, "must be # or #/$defs/NAME of this schema, without / ~ %")
            return {"$ref": f"#/$defs/{name}"}
        if keyword in ("const", "enum"):
            kinds = types(schema, place) or list(KEYWORDS)
            values = [value] if keyword == "const" else entries(value, here)
            fitting = [value for value in values if any(type(value) in CLASSES[k] for k in kinds)]
            if not fitting:
                raise ValueError(f"{here} has no value of the type beside it")
            return self.unlike({"enum": fitting})
        parts = self.schemas(value, here)
        if keyword == "allOf" and len(parts) > 1:
            refuse(keyword, place, "is enforced with a single part only")
        if keyword == "oneOf":
            self.one_of.append((place, schema.get("discriminator"), parts))
        return {"anyOf": parts}

    def check_tags(self, place: str, discriminator: Any, parts: list[dict[str, Any]]) -> None:
        """Refuses a `oneOf` whose parts may hold at once: xgrammar takes one of any."""
        name = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        tags: list[Any] = []
        for part in parts:
            target = self.definitions.get(part.get("$ref", "").removeprefix("#/$defs/"), part)
            is_tagged = target.get("type") == "object" and name in target["required"]
            tags += target["properties"][name].get("enum", [None]) if is_tagged else [None]
        if not all(isinstance(tag, str) for tag in tags) or len(set(tags)) < len(tags):
            refuse("oneOf", place, "needs a discriminator that is a different text in each part")

    def typed(self, kind: str, schema: dict[str, Any], place: str) -> dict[str, Any]:
        own = {name: schema[name] for name in KEYWORDS[kind] if name in schema}
        if kind == "string":
            return self.string(own, place)
        if kind == "array":
            return self.array(own, place)
        if kind == "object":
            return self.object(own, place)
        return {"type": kind, **{name: bound(own[name], name, kind, place) for name in own}}

    def string(self, own: dict[str, Any], place: str) -> dict[str, Any]:
        if not own:
            return {"type": "string"}
        regex = pattern(own, place)
        # Equal ones have one definition: xgrammar takes long for each.
        name = self.patterns.setdefault(regex, f"p{len(self.patterns)}")
        self.definitions[name] = {"type": "string", "pattern": regex}
        return {"$ref": f"#/$defs/{name}"}

    def array(self, own: dict[str, Any], place: str) -> dict[str, Any]:
        result: dict[str, Any] = {"type": "array", **counts(own, ("minItems", "maxItems"), place)}
        if "prefixItems" in own:
            result["prefixItems"] = self.schemas(own["prefixItems"], f"{place}/prefixItems")
        items = own.get("items", "prefixItems" not in own)
        return {**result, "items": self.further(items, f"{place}/items")}

    def further(self, schema: Any, place: str) -> dict[str, Any] | bool:
        """What else there may be; False: nothing."""
        return schema is not False and self.schema(schema, place)

    def object(self, own: dict[str, Any], place: str) -> dict[str, Any]:
        properties, further = own.get("properties", {}), own.get("additionalProperties", True)
        if not isinstance(properties, dict):
            refuse("properties", place, "must be an object")
        required = own.get("required", [])
        if not isinstance(required, list) or any(name not in [*properties] for name in required):
            refuse("required", place, "must be a list of names in properties")
        if properties:
            if not isinstance(further, bool):
                refuse("additionalProperties", place, "is not enforced beside properties")
            further = False
        here = f"{place}/properties"
        return self.unlike(
            {
                "type": "object",
                **counts(own, ("maxProperties",), place),
                "properties": {n: self.schema(p, f"{here}/{n}") for n, p in properties.items()},
                "required": required,
                "additionalProperties": self.further(further, f"{place}/additionalProperties"),
            }
        )

    def unlike(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Tells it from others: xgrammar takes two for one that differ in a key like "title"."""
        self.count += 1
        return {**schema, "unlike": self.count}


def check_known(schema: dict[str, Any], known: list[str], place: str) -> None:
    """Refuses keywords but those that are known at this place, and annotations."""
    allowed = {*known, *ANNOTATIONS, *(["$id"] if place == "#" else [])}
    for keyword in schema:
        if keyword not in allowed:
            refuse(keyword, place, f"is not enforced; known there: {', '.join(known)}")


def types(schema: dict[str, Any], place: str) -> list[str]:
    """Those that a schema names, or none."""
    if "type" not in schema:
        return []
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not kinds or not all(isinstance(kind, str) and kind in KEYWORDS for kind in kinds):
        refuse("type", place, f"must be among {', '.join(KEYWORDS)}")
    return list(dict.fromkeys(kinds))


def _integer(digits: str) -> int:
    """An integer that xgrammar can read."""
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise ValueError(f"{digits:.40} has more than 64 bits")
    return int(digits)


def refuse(keyword: str, place: str, reason: str) -> NoReturn:
    raise ValueError(f"{keyword!r} at {place} {reason}")


def entries(value: Any, place: str) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} must be a list of at least one entry")
    return value


def counts(keywords: dict[str, Any], names: tuple[str, ...], place: str) -> dict[str, int]:
    """Lengths and numbers of items: those of `names`, the least before the most, that are there."""
    found = {name: keywords[name] for name in names if name in keywords}
    for name, count in found.items():
        if type(count) is not int or not 0 <= count < 2**31:
            refuse(name, place, "must be an integer from 0 to 2**31 - 1")
    if found.get(names[0], 0) > found.get(names[-1], math.inf):
        refuse(names[0], place, f"must be at most {names[-1]}={found[names[-1]]}")
    return found


def pattern(keywords: dict[str, Any], place: str) -> str:
    """What all keywords of a string mean; "" if there are none."""
    lengths = counts(keywords, ("minLength", "maxLength"), place)
    given = [name for name in ("pattern", "format") if name in keywords]
    if given and (others := [*given[1:], *lengths]):
        refuse(others[0], place, f"is not enforced beside {given[0]}")
    if lengths:
        return _string_of(lengths.get("minLength", 0), lengths.get("maxLength"))
    if "format" in keywords:
        if keywords["format"] not in [*FORMATS]:  # a list, for a value may have no hash
            refuse("format", place, f"is not enforced but for {', '.join(FORMATS)}")
        return string_pattern(f"^{FORMATS[keywords['format']]}$")
    text = keywords.get("pattern", "")
    if not isinstance(text, str):
        refuse("pattern", place, "must be a text")
    try:
        return string_pattern(text)
    except ValueError as allowed:
        refuse("pattern", place, f"must be {allowed}")


def _string_of(least: int, most: int | None) -> str:
    """A regex of so many characters: xgrammar itself lets in some that JSON escapes."""
    if max(least, most or 0) <= MANY_CHARACTERS:
        return string_pattern(f"^.{{{least},{'' if most is None else most}}}$")
    # NOTE: of a class with more than ASCII, repeated from 2 or more to over 128 times, xgrammar
    # allows tokens that it then refuses. So what must be there comes in shorter pieces.
    many, some = divmod(least, MANY_CHARACTERS)
    must = f"({_CHARACTER}{{{MANY_CHARACTERS}}}){{{many}}}{_CHARACTER}{{{some}}}"
    return f"^{must}{_CHARACTER}{{0,{'' if most is None else most - least}}}$"


def bound(value: Any, name: str, kind: str, place: str) -> int | float:
    """A bound of a number or an integer."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        refuse(name, place, "must be a number")
    if kind == "integer":  # of a fraction the next integer means the same
        return math.ceil(value) if name in ("minimum", "exclusiveMaximum") else math.floor(value)
    if abs(value) > MAX_BOUND or round(value, DECIMALS) != value:
        refuse(name, place, f"must have {DECIMALS} decimals and be at most {MAX_BOUND:g} in size")
    return value
