"""How the tokens of one request are drawn, and when it ends."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypedDict

from nanovllm.structured.patterns import MAX_REGEX, check_characters, text_pattern
from nanovllm.structured.schemas import check_schema
from nanovllm.utils.options import (
    BOOLEAN,
    NONE,
    TEXT,
    as_list,
    as_text,
    check_value,
    choice,
    hinting,
    integer,
    number,
    option,
    short,
    token_ids,
    whole,
)

SAMPLES = integer(1, 2**14)  # of a prompt
LOGPROBS = NONE | integer(0, 20)
BIAS = number(-math.inf, 1e6)
SEED = NONE | integer(0, 2**63 - 1)
STRUCTURE = NONE | TEXT
# Fields that say what a completion has to follow.
STRUCTURES = ("json_schema", "regex", "grammar")


def _token_ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else token_ids(tuple(value) if isinstance(value, Set) else value)
    if ids is None or min(ids, default=0) < 0:
        raise ValueError("None or a sequence of token ids, integers of at least 0")
    return tuple(ids)


def _seed(value: Any) -> int | None:
    """To vLLM -1 is the same as None."""
    return None if whole(value) == -1 else SEED(value)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...] | None:
    """Ids may be texts of digits: JSON has no other keys."""
    if value is None:
        return None
    try:
        if not isinstance(value, (Mapping, tuple)):
            raise TypeError
        pairs = dict(value)
        biases = list(map(BIAS, pairs.values()))
        ids = _token_ids([int(key) if isinstance(key, str) else key for key in pairs])
    except (TypeError, ValueError):
        raise ValueError("None or a dict of token ids and numbers from -inf to 1e6") from None
    return tuple(dict(zip(ids, biases, strict=True)).items())


def _stop(value: Any) -> tuple[str, ...]:
    value = () if value is None else value if as_text(value) is None else (value,)
    listed = as_list(tuple(value) if isinstance(value, Set) else value)
    texts: list[Any] = [None] if listed is None else list(map(as_text, listed))
    if not all(texts):
        raise ValueError("None, a text or several texts, none of them empty")
    return tuple(texts)


def _regex(value: Any) -> str | None:
    text = STRUCTURE(value)
    if text:
        text_pattern(text)
    return text


def _grammar(value: Any) -> str | None:
    text = STRUCTURE(value)
    if text:
        if len(text) > MAX_REGEX:
            raise ValueError(f"a grammar of at most {MAX_REGEX} characters")
        check_characters(text)
    return text


@hinting
@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of one request.

    The logits are changed in this order: logit_bias and min_tokens, repetition_penalty,
    frequency_penalty and presence_penalty, temperature, min_p, top_k, top_p.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: draw from the k likeliest tokens only; -1 or 0: from all.
        top_p: draw from the likeliest tokens that together reach this probability only.
        max_tokens: tokens to generate at the most; None: up to the longest sequence.
        ignore_eos: go on after an end-of-sequence token.
        stop_token_ids: further tokens that end the request; they are kept as a tuple.
        seed: the same seed draws the same random numbers whatever else is in the batch; None or -1:
            random.
        presence_penalty: subtracted from the logits of all tokens that have been generated.
        frequency_penalty: subtracted once for every time that a token has been generated.
        repetition_penalty: of tokens that have been generated or are in the prompt, logits above 0
            are divided by it, others multiplied; 1 changes nothing.
        min_p: draw only from tokens with at least this share of the likeliest one's probability.
        min_tokens: until so many are generated, no text of `stop` counts, and neither an
            end-of-sequence token nor one of `stop_token_ids` can be drawn; these can where a schema
            or grammar says the end.
        logit_bias: numbers to add to the logits of single token ids, -inf to forbid one; they are
            kept as a tuple of pairs.
        logprobs: the completion says the log-probabilities of each generated token and of that many
            likeliest ones in its place, at most 20; None: of none.
        prompt_logprobs: the same for the tokens of the prompt, which then takes no cached prefix.
        stop: texts that end the request, of whatever tokens they are made; one text or several,
            kept as a tuple. The one that is complete first counts, and the text ends before it.
        include_stop_str_in_output: the text ends behind what has stopped it, a token or a text.
        skip_special_tokens: leave special tokens out of the text.
        n: samples of each prompt. With a seed, each sample has one of its own that follows from it;
            that of the first is the seed itself.
        json_schema: a JSON schema, as a dict or JSON text, that the completion follows; it is
            kept as text. Keywords that cannot be enforced are refused.
        regex: a regular expression, in JavaScript's syntax, that the whole completion matches.
        grammar: a grammar that it follows, in the EBNF of xgrammar. At most one of these three.
    """

    temperature: float = option(1.0, number(0, 100))
    top_k: int = option(-1, integer(0) | choice(-1))
    top_p: float = option(1.0, number(0, 1, open_low=True))
    max_tokens: int | None = option(64, NONE | integer(1))
    ignore_eos: bool = option(False, BOOLEAN)
    stop_token_ids: Collection[int] | None = option((), _token_ids)
    seed: int | None = option(None, _seed)
    presence_penalty: float = option(0.0, number(-2, 2))
    frequency_penalty: float = option(0.0, number(-2, 2))
    repetition_penalty: float = option(1.0, number(0, 100, open_low=True))
    min_p: float = option(0.0, number(0, 1))
    min_tokens: int = option(0, integer(0))
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None = option(
        None, _logit_bias
    )
    logprobs: int | None = option(None, LOGPROBS)
    prompt_logprobs: int | None = option(None, LOGPROBS)
    stop: str | Collection[str] | None = option((), _stop)
    include_stop_str_in_output: bool = option(False, BOOLEAN)
    skip_special_tokens: bool = option(True, BOOLEAN)
    n: int = option(1, integer(1))
    json_schema: Mapping[str, Any] | str | None = option(None, check_schema)
    regex: str | None = option(None, _regex)
    grammar: str | None = option(None, _grammar)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = check_value(field.name, getattr(self, field.name), field.metadata["rule"])
            object.__setattr__(self, field.name, value)
        given = [name for name in STRUCTURES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {' and '.join(given)}, not both")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={short(self.min_tokens)} is not allowed: it must be at most "
                f"max_tokens={short(self.max_tokens)}"
            )

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
    max_tokens: int | None
    ignore_eos: bool
    stop_token_ids: Collection[int] | None
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    min_p: float
    min_tokens: int
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] | None
    logprobs: int | None
    prompt_logprobs: int | None
    stop: str | Collection[str] | None
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    n: int
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None


def check_runnable(params: Iterable[SamplingParams], vocab_size: int) -> None:
    """Raises ValueError if a `logit_bias` has a token beyond the vocabulary, or an `n` is huge."""
    for each in params:
        check_value("n", each.n, SAMPLES)
    for bias in dict.fromkeys(each.logit_bias for each in params if each.logit_bias):
        highest = max(dict(bias))
        if highest >= vocab_size:
            raise ValueError(
                f"logit_bias holds token id {short(highest)}, which is outside the vocabulary: "
                f"ids are from 0 to {vocab_size - 1}"
            )


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
            raise TypeError(f"sampling_params holds {short(item)}, which is no SamplingParams")
    if len(params) != count:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts: give one, or one each"
        )
    return params
