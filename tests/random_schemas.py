"""Random JSON schemas of the keywords that are enforced, small enough for a completion to end."""

import random
from typing import Any

NAMES = ["a", "title", "description", 'quo"te', "é", "long name", "type", "$ref"]
VALUES: list[Any] = [0, 1, -7, 2.5, True, False, None, "", "text", 'a"\\\n/é', [1, None]]
VALUES += [{"title": 1}, {"default": 1}]  # alike but for a keyword of annotations
PATTERNS = [
    r"^[a-c]{2,3}$",
    r"^.{1,4}$",
    r"^[^a-z]{1,3}$",
    r"^[^\sa-z]{1,2}x$",
    r"^(ab|\d\d?)+x?$",
    r"^\w{1,5}$",
    r"^[\w.\-]{3}$",
]
FORMATS = ["date", "time", "date-time", "uuid"]


class RandomSchema:
    """Draws one: `RandomSchema(seed).schema`.

    A value that goes on for ever, as a recursive reference may, ends with the completion's length;
    so references go to what has been drawn before, or to the root behind an alternative.
    """

    def __init__(self, seed: int, depth: int = 3) -> None:
        self.random = random.Random(seed)
        self.definitions: dict[str, Any] = {}
        self.schema: dict[str, Any] = self.draw(depth)
        if self.definitions:
            self.schema["$defs"] = self.definitions
        if self.maybe():
            self.schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"

    def maybe(self, share: float = 0.5) -> bool:
        return self.random.random() < share

    def draw(self, depth: int) -> dict[str, Any]:
        """A schema whose values are nested to that depth at the most."""
        kinds = [self.string, self.integer, self.number, self.values, self.plain]
        if depth:
            nested = [self.array, self.object, self.object, self.map, self.any_of, self.one_of]
            kinds = [*kinds, *nested, self.several, self.reference]
            schema = self.random.choice(kinds)(depth - 1)
        else:
            schema = self.random.choice(kinds)(0)
        if self.maybe(0.2):
            schema["description"] = "an annotation"
        return schema

    def string(self, depth: int) -> dict[str, Any]:
        kind = self.random.randrange(4)
        if kind == 0:
            return {"type": "string", "pattern": self.random.choice(PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self.random.choice(FORMATS)}
        schema: dict[str, Any] = {"type": "string", "maxLength": self.random.randint(0, 12)}
        if self.maybe():
            schema["minLength"] = self.random.randint(0, schema["maxLength"])
        return schema

    def integer(self, depth: int) -> dict[str, Any]:
        return {"type": "integer", **self.bounds(lambda: self.random.randint(-5000, 5000), 3)}

    def number(self, depth: int) -> dict[str, Any]:
        decimals = self.random.choice([0, 1, 3, 6])
        low_and_high = lambda: round(self.random.uniform(-2000, 2000), decimals)  # noqa: E731
        return {"type": "number", **self.bounds(low_and_high, 1)}

    def bounds(self, draw: Any, distance: int) -> dict[str, Any]:
        low, high = sorted([draw(), draw()])
        schema: dict[str, Any] = {}
        if self.maybe(0.7):
            schema[self.random.choice(["minimum", "exclusiveMinimum"])] = low
        if self.maybe(0.7):
            schema[self.random.choice(["maximum", "exclusiveMaximum"])] = round(high + distance, 6)
        return schema

    def values(self, depth: int) -> dict[str, Any]:
        if self.maybe(0.3):
            return {"const": self.random.choice(VALUES)}
        schema: dict[str, Any] = {"enum": self.random.sample(VALUES, 3)}
        if self.maybe(0.3):
            schema = {"type": "string", "enum": [*schema["enum"], "always"]}
        return schema

    def plain(self, depth: int) -> dict[str, Any]:
        return {"type": self.random.choice(["boolean", "null"])}

    def array(self, depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "array"}
        low = self.random.randint(0, 2)
        if self.maybe(0.3):
            schema["prefixItems"] = [self.draw(depth) for _ in range(self.random.randint(1, 2))]
            if self.maybe():
                return schema | {"items": False}
            low = max(low, len(schema["prefixItems"]))
        schema |= {"items": self.draw(depth), "maxItems": low + self.random.randint(0, 2)}
        return schema | ({"minItems": low} if self.maybe() else {})

    def object(self, depth: int) -> dict[str, Any]:
        names = self.random.sample(NAMES, self.random.randint(1, 4))
        properties = {name: self.draw(depth) for name in names}
        schema: dict[str, Any] = {"type": "object", "properties": properties}
        if self.maybe(0.7):
            schema["required"] = [name for name in names if self.maybe()]
        if self.maybe(0.3):
            schema["additionalProperties"] = self.maybe()
        if self.maybe(0.2):
            fewest = len(schema.get("required", ()))
            schema["maxProperties"] = self.random.randint(fewest, len(names))
        return schema

    def map(self, depth: int) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self.draw(depth), "maxProperties": 2}

    def any_of(self, depth: int) -> dict[str, Any]:
        parts = [self.draw(depth) for _ in range(self.random.randint(1, 3))]
        return {"allOf": parts[:1]} if self.maybe(0.2) else {"anyOf": parts}

    def one_of(self, depth: int) -> dict[str, Any]:
        tagged = [
            {
                "type": "object",
                "properties": {"tag": {"const": tag}, "value": self.draw(depth)},
                "required": ["tag"],
            }
            for tag in ("one", "two")
        ]
        return {
            "oneOf": [tagged[0], self.define(tagged[1])],
            "discriminator": {"propertyName": "tag"},
        }

    def several(self, depth: int) -> dict[str, Any]:
        kinds = {
            "string": self.string,
            "integer": self.integer,
            "array": self.array,
            "null": lambda depth: {},
        }
        types = self.random.sample(list(kinds), 2)
        parts = [kinds[name](depth) for name in types]
        return {**parts[0], **parts[1], "type": types}

    def reference(self, depth: int) -> dict[str, Any]:
        if self.definitions and self.maybe():
            return {"$ref": f"#/$defs/{self.random.choice(list(self.definitions))}"}
        if self.maybe(0.3):
            items = {"anyOf": [{"type": "null"}, {"$ref": "#"}, self.integer(0)]}
            return {"type": "array", "items": items, "maxItems": 1}
        return self.define(self.draw(depth))

    def define(self, schema: dict[str, Any]) -> dict[str, Any]:
        name = f"def{len(self.definitions)}"
        self.definitions[name] = schema
        return {"$ref": f"#/$defs/{name}"}
