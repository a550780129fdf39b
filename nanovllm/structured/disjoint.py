"""Whether no value meets two JSON schemas at once, as far as their types and values show.

`oneOf` asks for that; xgrammar only takes one of any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nanovllm.structured.keywords import KEYWORDS

# Properties of properties that are looked at.
DEPTH = 4


def are_disjoint(one: Any, other: Any, follow: Callable[[Any], Any], depth: int = DEPTH) -> bool:
    """Whether two schemas, which have been checked, clearly exclude one another.

    `follow` gives what a schema refers to, or the schema itself.
    """
    one, other = follow(one), follow(other)
    if not depth or not isinstance(one, dict) or not isinstance(other, dict):
        return False
    values, others = _values(one), _values(other)
    if values is not None and others is not None:
        return not any(_equal(a, b) for a in values for b in others)
    kinds, more = _kinds(one), _kinds(other)
    if kinds and more and not kinds & more:
        return True
    return kinds == more == {"object"} and any(
        are_disjoint(one["properties"][name], other["properties"][name], follow, depth - 1)
        for name in {*one.get("required", ())} & {*other.get("required", ())}
    )


def is_a(value: Any, kind: str) -> bool:
    """Whether a JSON value is of a type; a whole float is an integer, too."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, float):
        return kind == "number" or (kind == "integer" and value.is_integer())
    classes = {"string": str, "integer": int, "number": int, "array": list, "object": dict}
    return kind in classes and isinstance(value, classes[kind])


def _values(schema: dict[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _kinds(schema: dict[str, Any]) -> set[str]:
    """Types of its values, integers as numbers; none if it does not say."""
    values, named = _values(schema), schema.get("type", [])
    if values is not None:
        named = [kind for kind in KEYWORDS if any(is_a(value, kind) for value in values)]
    return {
        "number" if k == "integer" else k for k in ([named] if isinstance(named, str) else named)
    }


def _equal(one: Any, other: Any) -> bool:
    """Whether two JSON values may be the same; true and 1 are not."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)
