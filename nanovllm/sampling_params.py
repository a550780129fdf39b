"""How the tokens of one request are drawn, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypedDict

from nanovllm.structured.patterns import MAX_REGEX, text_pattern
from nanovllm.structured.schemas import check_schema
from nanovllm.utils.options import (
    boolean,
    check,
    hinting,
    integer,
    number,
    option,
    token_ids,
    whole,
)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    ids = token_ids(tuple(value) if isinstance(value, Set) else value)
    if ids is None or min(ids, default=0) < 0:
        raise ValueError("a sequence of token ids, integers of at least 0")
    return tuple(ids)


def _seed(value: Any) -> int | None:
    seed = whole(value)
    if value is None or (seed is not None and 0 <= seed < 2**63):
        return seed
    raise ValueError("None or an integer from 0 to 2**63 - 1")


def _text(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise ValueError("None or a text")


def _regex(value: Any) -> str | None:
    if _text(value):
        text_pattern(value)
    return value


def _grammar(value: Any) -> str | None:
    if len(_text(value) or "") > MAX_REGEX:
        raise ValueError(f"a grammar of at most {MAX_REGEX} characters")
    return value


# Fields that say what a completion has to follow.
STRUCTURES = ("json_schema", "regex", "grammar")


@hinting
@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: draw from the k likeliest tokens only; -1: from all.
        top_p: draw from the likeliest tokens that together reach this probability only.
        max_tokens: tokens to generate at the most.
        ignore_eos: go on after an end-of-sequence token.
        stop_token_ids: further tokens that end the request; they are kept as a tuple.
        seed: the same seed draws the same random numbers whatever else is in the batch; None:
            random.
        json_schema: a JSON schema, as a dict or JSON text, that the completion follows; it is
            kept as text. Keywords that cannot be enforced are refused.
        regex: a regular expression, in JavaScript's syntax, that the whole completion matches.
        grammar: a grammar that it follows, in the EBNF of xgrammar. At most one of these three.
    """

    temperature: float = option(1.0, number(0, 100))
    top_k: int = option(-1, integer(1, also=-1))
    top_p: float = option(1.0, number(0, 1, open_low=True))
    max_tokens: int = option(64, integer(1))
    ignore_eos: bool = option(False, boolean)
    stop_token_ids: Collection[int] = option((), _stop_token_ids)
    seed: int | None = option(None, _seed)
    json_schema: Mapping[str, Any] | str | None = option(None, check_schema)
    regex: str | None = option(None, _regex)
    grammar: str | None = option(None, _grammar)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = check(self, field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")

    @property
    def structure(self) -> tuple[str, str] | None:
        """The field that says what a completion has to follow, and its text."""
        given = ((name, getattr(self, name)) for name in STRUCTURES)
        return next(((name, text) for name, text in given if text is not None), None)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams`, as the types of keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    ignore_eos: bool
    stop_token_ids: Collection[int]
    seed: int | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None


def params_per_prompt(
    given: SamplingParams | Sequence[SamplingParams] | None, count: int, fields: SamplingOptions
) -> list[SamplingParams]:
    """One `SamplingParams` for each of `count` prompts."""
    if fields and given is not None:
        raise TypeError(
            f"give either sampling_params or single options ({', '.join(fields)}), not both"
        )
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams(**fields)] * count
    params = list(given) if isinstance(given, Iterable) else [given]
    for item in params:
        if not isinstance(item, SamplingParams):
            raise TypeError(f"sampling_params holds {item!r}, which is no SamplingParams")
    if len(params) != count:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts: give one, or one each"
        )
    return params
