"""Which JSON schemas and regexes are taken, and that the others are refused by name and place."""

import json
import re
from collections import ChainMap
from types import MappingProxyType
from typing import Any

import pytest

from nanovllm import SamplingParams
from nanovllm.structured.patterns import MAX_REGEX, MAX_STATES, string_pattern
from nanovllm.structured.schemas import MAX_TEXT, translate
from tests.random_schemas import RandomSchema

TEXT, INTEGER = {"type": "string"}, {"type": "integer"}
ONE = {"type": "object", "properties": {"a": INTEGER}}
BY_TAG = {"discriminator": {"propertyName": "tag"}}


def tagged(*values: object) -> dict[str, Any]:
    return {"type": "object", "properties": {"tag": {"enum": [*values]}}, "required": ["tag"]}


# What xgrammar 0.2.8 takes and does not enforce, or enforces wrongly; the keyword that is named.
NOT_ENFORCED = [
    ({"type": "array", "items": INTEGER, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": INTEGER}, "contains"),
    ({"type": "array", "minItems": 5, "maxItems": 3}, "minItems"),
    ({"type": "array", "minContains": 2}, "minContains"),
    ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    ({**INTEGER, "multipleOf": 5}, "multipleOf"),
    ({"type": "number", "minimum": 1e-9}, "minimum"),
    ({"type": "number", "maximum": 558818753611.3}, "maximum"),
    ({**TEXT, "format": "idn-email"}, "format"),
    ({**TEXT, "pattern": "^a", "maxLength": 3}, "maxLength"),
    ({**TEXT, "format": "date", "minLength": 3}, "minLength"),
    ({**TEXT, "contentEncoding": "base64"}, "contentEncoding"),
    ({**TEXT, "minLength": 5, "maxLength": 3}, "minLength"),
    ({**TEXT, "maxLenght": 3}, "maxLenght"),
    ({**INTEGER, "maxLength": 3}, "maxLength"),
    ({**INTEGER, "not": {"const": 3}}, "not"),
    ({**INTEGER, "if": {"minimum": 3}, "then": {"const": 7}}, "if"),
    ({**ONE, "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({**ONE, "dependentSchemas": {"a": True}}, "dependentSchemas"),
    ({**ONE, "patternProperties": {"^x": INTEGER}}, "patternProperties"),
    ({**ONE, "propertyNames": {"maxLength": 3}}, "propertyNames"),
    ({**ONE, "unevaluatedProperties": False}, "unevaluatedProperties"),
    ({**ONE, "additionalProperties": TEXT}, "additionalProperties"),
    ({**ONE, "required": ["z"]}, "required"),
    ({**ONE, "minProperties": 1}, "minProperties"),
    ({"anyOf": [ONE, INTEGER], "required": ["a"]}, "required"),
    ({"anyOf": [INTEGER, TEXT], "type": "string"}, "type"),
    ({"allOf": [INTEGER, {"minimum": 3, "type": "integer"}]}, "allOf"),
    ({"oneOf": [INTEGER, TEXT]}, "oneOf"),
    ({"oneOf": [tagged(True), TEXT, INTEGER], **BY_TAG}, "oneOf"),
    ({"oneOf": [tagged("a"), tagged("b")]}, "oneOf"),
    ({"oneOf": [tagged("a"), tagged("a", "b")], **BY_TAG}, "oneOf"),
    ({"oneOf": [tagged(1), tagged(1.0)], **BY_TAG}, "oneOf"),
    ({"oneOf": [tagged("a"), {**tagged("b"), "required": []}], **BY_TAG}, "oneOf"),
    ({"oneOf": [tagged("a"), {**tagged("b"), "type": ["object", "null"]}], **BY_TAG}, "oneOf"),
    ({"$ref": "#/$defs/a", "$defs": {"a": INTEGER}, "minimum": 5}, "minimum"),
    ({"$ref": "http://example.com/schema"}, "$ref"),
    ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": INTEGER}}, "$ref"),
    ({"$ref": "#/$defs/a/b", "$defs": {"a/b": INTEGER, "a": {}}}, "$ref"),
    ({"$ref": "#/$defs/none"}, "$ref"),
    ({"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}}, "$ref"),
    ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ({"type": "text"}, "type"),
    ({"type": []}, "type"),
    ({"minimum": 3}, "minimum"),
    ({"properties": {"a": INTEGER}}, "properties"),
    ({**TEXT, "nullable": True}, "nullable"),
]


@pytest.mark.parametrize(("schema", "keyword"), NOT_ENFORCED, ids=lambda x: json.dumps(x)[:60])
def test_a_keyword_that_is_not_enforced_is_refused_by_name_and_place(schema, keyword):
    for inner, place in [
        (schema, "#"),
        ({"type": "object", "properties": {"x": schema}}, "#/properties/x"),
        ({"type": "array", "items": {"anyOf": [TEXT, schema]}}, "#/items/anyOf/1"),
        ({"$ref": "#/$defs/d", "$defs": {"d": schema}}, "#/$defs/d"),
    ]:
        if "$ref" in schema and inner is not schema:
            continue  # what it points to would not be there
        with pytest.raises(ValueError, match=re.escape(f"'{keyword}' at {place} ")):
            SamplingParams(json_schema=json.dumps(inner))


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (False, "# is False"),
        ({"anyOf": [INTEGER, False]}, "#/anyOf/1 is False"),
        ({"enum": []}, "#/enum must be a list of at least one"),
        ({"enum": [1, 2], "type": "string"}, "#/enum has no value of the type"),
        ({"anyOf": []}, "#/anyOf must be a list"),
        ({"const": 2**70}, "more than 64 bits"),
        ({"const": "\ud800"}, "surrogates"),
        ({"type": "array", "items": None}, "#/items is None"),
        ({"type": "object", "additionalProperties": 0}, "#/additionalProperties is 0"),
        ({**TEXT, "format": ["date"]}, "'format' at # is not enforced"),
        ({**ONE, "required": [["a"]]}, "'required' at # must be"),
        ({**TEXT, "maxLength": -1}, "'maxLength' at # must be an integer"),
        ({**TEXT, "maxLength": True}, "'maxLength' at # must be an integer"),
        ({**INTEGER, "minimum": "3"}, "'minimum' at # must be a number"),
        ({**TEXT, "title": "x" * MAX_TEXT}, f"longer than {MAX_TEXT}"),
    ],
)
def test_a_schema_that_is_none_is_refused(schema, words):
    with pytest.raises(ValueError, match=rf"^json_schema=.*{words}"):
        SamplingParams(json_schema=json.dumps(schema))


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 10**5, '{"const": NaN}', '{"const": 1e400}', '{"a": 1} x']
)
def test_a_text_that_is_no_json_is_refused(text):
    with pytest.raises(ValueError, match=r"^json_schema="):
        SamplingParams(json_schema=text)


def test_a_schema_is_kept_as_text_whatever_it_was():
    schema = RandomSchema(3).schema
    params = SamplingParams(json_schema=schema)
    assert params == SamplingParams(json_schema=json.dumps(schema, indent=2))
    assert hash(params) == hash(SamplingParams(json_schema=params.json_schema))
    assert json.loads(params.structure[1]) == schema


def test_alternatives_that_a_tag_tells_apart_are_any_of_them():
    of_model = {"oneOf": [tagged("a"), {"$ref": "#/$defs/b"}], **BY_TAG}
    translated = translate({**of_model, "$defs": {"b": tagged("b", "c")}})
    assert [*translated["$defs"]["d0"]] == ["anyOf"]


def test_references_in_a_circle_end():
    translate({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#"}}})
    with pytest.raises(ValueError, match="'oneOf' at #"):
        translate({"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#"}], "$defs": {"a": {"$ref": "#"}}})


def test_annotations_change_nothing():
    notes = {"title": "t", "description": "d", "default": 5, "examples": [1], "$comment": "c"}
    assert translate({**INTEGER, **notes, "$id": "here"}) == translate(INTEGER)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ('a"b', "does not escape"),
        (r"a\\b", "does not escape"),
        ("é", "does not escape"),
        ("a\nb", "does not escape"),
        (r"\n", r"without \\n"),
        (r"\S+", r"without \\S"),
        (r"[\W]", r"without \\W"),
        (r"\Aa", r"without \\A"),
        ("a^b", "at its ends"),
        ("(a$|b)", "at its ends"),
        ("a{3000}", "with its repetitions"),
        ("((a{100}b){10}){10}", "with its repetitions"),
        ("a" * (MAX_STATES + 1), "with its repetitions"),
        ("[^z-a]", "is none"),
        ("[^é]", "does not escape"),
        (r"[^\s!-~]", "some ASCII character"),
        (r"^(?=.*[0-9])[a-z0-9]{4}$", r"without \(\?"),
        ("(?!a)[ab]", r"without \(\?"),
        ("(?<=a)b", r"without \(\?"),
        ("(?i)a", r"without \(\?"),
        ("a(?", r"without \(\?"),
        ("a**", "repeats what is repeated"),
        ("a{2}{2}", "repeats what is repeated"),
    ],
)
def test_a_pattern_that_would_match_something_else_is_refused(pattern, words):
    with pytest.raises(ValueError, match=rf"'pattern' at # must be .*{words}"):
        SamplingParams(json_schema={**TEXT, "pattern": pattern})


def test_a_schema_may_be_any_mapping():
    schema = {**TEXT, "maxLength": 3}
    for mapping in (MappingProxyType(schema), ChainMap(schema)):
        assert SamplingParams(json_schema=mapping) == SamplingParams(json_schema=schema)


@pytest.mark.parametrize(
    "pattern",
    [
        r"^\d{4}-\d{2}$", r"[\w.\-]+@[\w\-]+(\.\w{2,8}){1,3}", "a|b", "(?:a)(?<name>b)",
        r"\(?=a[(?=]", "a*?b??c{2}?",
    ],
)  # fmt: skip
def test_a_pattern_of_plain_characters_stays_as_it_is(pattern):
    assert string_pattern(pattern) == pattern


@pytest.mark.parametrize("regex", [r"\Aab", "a^b", "(a$)b", r"[\Z]", "a" * (MAX_REGEX + 1)])
def test_a_regex_that_would_match_something_else_is_refused(regex):
    with pytest.raises(ValueError, match=r"^regex=.* is not allowed: it must be "):
        SamplingParams(regex=regex)


def test_one_structure_at_a_time():
    with pytest.raises(ValueError, match="give one of json_schema and regex, not both"):
        SamplingParams(json_schema={}, regex="a")
