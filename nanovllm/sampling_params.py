"""How the tokens of one request are drawn, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypedDict

from nanovllm.utils.options import (
    as_list,
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


def _stop(value: Any) -> tuple[str, ...]:
    value = () if value is None else (value,) if isinstance(value, str) else value
    texts = as_list(tuple(value) if isinstance(value, Set) else value)
    if texts is None or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("None, a text or several texts, none of them empty")
    return tuple(map(str, texts))


def _max_tokens(value: Any) -> int | None:
    tokens = whole(value)
    if value is None or (tokens is not None and tokens >= 1):
        return tokens
    raise ValueError("None or an integer of at least 1")


def _seed(value: Any) -> int | None:
    seed = whole(value)
    if value is None or (seed is not None and 0 <= seed < 2**63):
        return seed
    raise ValueError("None or an integer from 0 to 2**63 - 1")


@hinting
@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: draw from the k likeliest tokens only; -1 or 0: from all.
        top_p: draw from the likeliest tokens that together reach this probability only.
        max_tokens: tokens to generate at the most; None: up to the longest sequence.
        ignore_eos: go on after an end-of-sequence token.
        stop_token_ids: further tokens that end the request; they are kept as a tuple.
        seed: the same seed draws the same random numbers whatever else is in the batch; None:
            random.
        stop: texts that end the request, of whatever tokens they are made; one text or several,
            kept as a tuple. The one that is complete first counts, and the text ends before it.
        include_stop_str_in_output: the text ends behind what has stopped it, a token or a text.
        skip_special_tokens: leave special tokens out of the text.
        n: samples of each prompt. With a seed, each sample has one of its own that follows from it;
            that of the first is the seed itself.
    """

    temperature: float = option(1.0, number(0, 100))
    top_k: int = option(-1, integer(0, also=-1))
    top_p: float = option(1.0, number(0, 1, open_low=True))
    max_tokens: int | None = option(64, _max_tokens)
    ignore_eos: bool = option(False, boolean)
    stop_token_ids: Collection[int] = option((), _stop_token_ids)
    seed: int | None = option(None, _seed)
    stop: str | Collection[str] | None = option((), _stop)
    include_stop_str_in_output: bool = option(False, boolean)
    skip_special_tokens: bool = option(True, boolean)
    n: int = option(1, integer(1))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = check(self, field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams`, as the types of keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int | None
    ignore_eos: bool
    stop_token_ids: Collection[int]
    seed: int | None
    stop: str | Collection[str] | None
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    n: int


def params_per_prompt(
    given: SamplingParams | Sequence[SamplingParams] | None,
    count: int,
    fields: SamplingOptions,
    defaults: SamplingOptions,
) -> list[SamplingParams]:
    """One `SamplingParams` for each of `count` prompts; `defaults` are of fields not given."""
    if fields and given is not None:
        raise TypeError(
            f"give either sampling_params or single options ({', '.join(fields)}), not both"
        )
    if given is None or isinstance(given, SamplingParams):
        options: SamplingOptions = {**defaults, **fields}
        return [given or SamplingParams(**options)] * count
    params = list(given) if isinstance(given, Iterable) else [given]
    for item in params:
        if not isinstance(item, SamplingParams):
            raise TypeError(f"sampling_params holds {item!r}, which is no SamplingParams")
    if len(params) != count:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts: give one, or one each"
        )
    return params
