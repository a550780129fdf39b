"""JSON schemas of which xgrammar enforces every keyword; all others are refused, by name and place.

xgrammar ignores what it does not know, and some of what it knows where it stands beside something
else. So nothing is handed on: a schema is translated, keyword by keyword of the tables in
keywords.py, into one that xgrammar takes to the letter. A translation may allow less than the
schema (objects have no properties but those that are named), never more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from nanovllm.structured.keywords import (
    ANNOTATIONS,
    CLASSES,
    COMPOSED,
    KEYWORDS,
    bound,
    counts,
    entries,
    pattern,
    refuse,
)

MAX_TEXT = 2**16
MAX_INTEGER = 2**63 - 1


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
            raise ValueError(f"{place} is {schema!r:.40}, which is no schema that a value can meet")
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
        return {**result, "items": items and self.schema(items, f"{place}/items")}

    def object(self, own: dict[str, Any], place: str) -> dict[str, Any]:
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
        here = f"{place}/properties"
        return self.unlike(
            {
                "type": "object",
                **counts(own, ("maxProperties",), place),
                "properties": {n: self.schema(p, f"{here}/{n}") for n, p in properties.items()},
                "required": required,
                "additionalProperties": further
                and self.schema(further, f"{place}/additionalProperties"),
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


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
