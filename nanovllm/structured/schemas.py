"""JSON schemas of which xgrammar enforces every keyword; all others are refused, by name and place.

xgrammar ignores what it does not know, and some of what it knows where it stands beside something
else. So nothing is handed on: a schema is translated, keyword by keyword of the tables in
keywords.py, into one that xgrammar takes to the letter. A translation may allow less than the
schema (objects have no properties but those that are named), never more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from nanovllm.structured.disjoint import are_disjoint, is_a
from nanovllm.structured.keywords import (
    ANNOTATIONS,
    COMPOSED,
    KEYWORDS,
    bound,
    check_beside,
    counts,
    entries,
    refuse,
    string,
)

MAX_TEXT = 2**16
MAX_INTEGER = 2**63 - 1
# References that are followed one after the other, as they may go round in a circle.
MAX_STEPS = 8


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
        self.names: dict[str, str] = {}  # of definitions, by what refers to them
        self.definitions: dict[str, Any] = {}
        self.count = 0
        self.translated = {**self.schema(root, "#"), "$defs": self.definitions}

    def schema(self, schema: Any, place: str) -> dict[str, Any]:
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise ValueError(f"{place} is {schema!r:.40}, which is no schema that a value can meet")
        for keyword, beside in COMPOSED.items():
            if keyword in schema:
                self.check_keywords(schema, [keyword, *beside], place)
                return self.composed(keyword, schema, place)
        kinds = self.types(schema, place)
        known = ["type", *dict.fromkeys(name for kind in kinds for name in KEYWORDS[kind])]
        self.check_keywords(schema, known, place)
        parts = [self.typed(kind, schema, place) for kind in kinds]
        return {"anyOf": parts} if len(parts) > 1 else parts[0] if parts else {}

    def check_keywords(self, schema: dict[str, Any], known: list[str], place: str) -> None:
        """Refuses all but those that are known at this place, and annotations."""
        allowed = {*known, *ANNOTATIONS, *(["$id"] if place == "#" else [])}
        for keyword in schema:
            if keyword not in allowed:
                if known == ["type"] and any(keyword in of_type for of_type in KEYWORDS.values()):
                    refuse(keyword, place, "is not enforced beside this type, or without one")
                refuse(keyword, place, f"is not enforced; known there: {', '.join(known)}")

    def types(self, schema: dict[str, Any], place: str) -> list[str]:
        """Those that it names; or else of objects and arrays what its keywords mean; or none."""
        if "type" not in schema:
            meant = ("object", "array")
            return [kind for kind in meant if not schema.keys().isdisjoint(KEYWORDS[kind])][:1]
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not kinds or not all(isinstance(kind, str) and kind in KEYWORDS for kind in kinds):
            refuse("type", place, f"must be among {', '.join(KEYWORDS)}")
        return list(dict.fromkeys(kinds))

    def composed(self, keyword: str, schema: dict[str, Any], place: str) -> dict[str, Any]:
        value, here = schema[keyword], f"{place}/{keyword}"
        if keyword == "$ref":
            return self.reference(value, place)
        if keyword in ("const", "enum"):
            values = [value] if keyword == "const" else entries(value, here)
            kinds = self.types(schema, place) if "type" in schema else list(KEYWORDS)
            fitting = [value for value in values if any(is_a(value, kind) for kind in kinds)]
            if not fitting:
                raise ValueError(f"{here} has no value of the type beside it")
            return self.unlike({"enum": fitting})
        parts = [self.schema(part, f"{here}/{i}") for i, part in enumerate(entries(value, here))]
        if keyword == "allOf" and len(parts) > 1:
            refuse(keyword, place, "is enforced with a single part only")
        if keyword == "oneOf" and not all(
            are_disjoint(one, other, self.follow)
            for i, one in enumerate(value)
            for other in value[:i]
        ):
            refuse(keyword, place, "has parts that may hold at once; anyOf may do")
        return {"anyOf": parts}

    def typed(self, kind: str, schema: dict[str, Any], place: str) -> dict[str, Any]:
        own = {name: schema[name] for name in KEYWORDS[kind] if name in schema}
        check_beside(own, place)
        if kind == "string":
            return self.shared({"type": kind, **string(own, place)})
        if kind == "array":
            return self.array(own, place)
        if kind == "object":
            return self.object(own, place)
        return {"type": kind, **{name: bound(own[name], name, kind, place) for name in own}}

    def array(self, own: dict[str, Any], place: str) -> dict[str, Any]:
        result: dict[str, Any] = {"type": "array", **counts(own, ("minItems", "maxItems"), place)}
        if "prefixItems" in own:
            here = f"{place}/prefixItems"
            parts = entries(own["prefixItems"], here)
            result["prefixItems"] = [self.schema(p, f"{here}/{i}") for i, p in enumerate(parts)]
        items = own.get("items", "prefixItems" not in own)
        result["items"] = items and self.schema(items, f"{place}/items")
        return result

    def object(self, own: dict[str, Any], place: str) -> dict[str, Any]:
        limits = counts(own, ("minProperties", "maxProperties"), place)
        properties, further = own.get("properties", {}), own.get("additionalProperties", True)
        if not isinstance(properties, dict):
            refuse("properties", place, "must be an object")
        required = own.get("required", [])
        if not isinstance(required, list) or not all(name in properties for name in required):
            refuse("required", place, "must be a list of names in properties")
        if properties:
            if not isinstance(further, bool):
                refuse("additionalProperties", place, "is not enforced beside properties")
            further = False
        elif limits.get("minProperties", 0) > 1:  # a name may come twice
            refuse("minProperties", place, "is not enforced above 1 without properties")
        here = f"{place}/properties"
        return self.unlike(
            {
                "type": "object",
                **limits,
                "properties": {n: self.schema(p, f"{here}/{n}") for n, p in properties.items()},
                "required": required,
                "additionalProperties": further
                and self.schema(further, f"{place}/additionalProperties"),
            }
        )

    def reference(self, reference: Any, place: str) -> dict[str, Any]:
        target = self.resolve(reference, place)
        if reference not in self.names:
            name = self.names[reference] = f"d{len(self.names)}"
            self.definitions[name] = self.schema(target, reference)
        return {"$ref": f"#/$defs/{self.names[reference]}"}

    def resolve(self, reference: Any, place: str) -> Any:
        if not isinstance(reference, str) or not re.fullmatch("#(/[^~%]*)?", reference):
            refuse("$ref", place, "must be # or #/..., without ~ and %")
        target = self.root
        for part in reference.split("/")[1:]:
            if not isinstance(target, dict) or part not in target:
                refuse("$ref", place, f"points to {reference}, which is not there")
            target = target[part]
        return target

    def follow(self, schema: Any) -> Any:
        for _ in range(MAX_STEPS):
            if isinstance(schema, dict) and "$ref" in schema:
                schema = self.resolve(schema["$ref"], "#")
        return schema

    def shared(self, schema: dict[str, Any]) -> dict[str, Any]:
        """A reference to it: xgrammar takes long for patterns, and compiles equal ones anew."""
        name = self.names.setdefault(json.dumps(schema), f"d{len(self.names)}")
        self.definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}

    def unlike(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Tells it from others: xgrammar takes two for one that differ in a key like "title"."""
        self.count += 1
        return {**schema, "unlike": self.count}


def _integer(digits: str) -> int:
    """An integer that xgrammar can read."""
    if len(digits) > 20 or abs(int(digits)) > MAX_INTEGER:
        raise ValueError(f"{digits:.40} has more than 64 bits")
    return int(digits)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
