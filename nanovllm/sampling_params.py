"""How the tokens of one request are drawn, and when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypedDict

from nanovllm.utils.options import (
    Rule,
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


def _at_most(limit: int, shown: str) -> Rule:
    """None, or whole numbers from 0 to `limit`."""

    def rule(value: Any) -> int | None:
        found = whole(value)
        if value is None or (found is not None and 0 <= found <= limit):
            return found
        raise ValueError(f"None or an integer from 0 to {shown}")

    return rule


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
        logprobs: the completion says the log-probabilities of each generated token and of that many
            likeliest ones in its place, at most 20; None: of none.
        prompt_logprobs: the same for the tokens of the prompt, which then takes no cached prefix.
    """

    temperature: float = option(1.0, number(0, 100))
    top_k: int = option(-1, integer(1, also=-1))
    top_p: float = option(1.0, number(0, 1, open_low=True))
    max_tokens: int = option(64, integer(1))
    ignore_eos: bool = option(False, boolean)
    stop_token_ids: Collection[int] = option((), _stop_token_ids)
    seed: int | None = option(None, _at_most(2**63 - 1, "2**63 - 1"))
    logprobs: int | None = option(None, _at_most(20, "20"))
    prompt_logprobs: int | None = option(None, _at_most(20, "20"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = check(self, field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @property
    def asks_logprobs(self) -> bool:
        """Whether the completion has log-probabilities, of whatever tokens."""
        return self.logprobs is not None or self.prompt_logprobs is not None


class SamplingOptions(TypedDict, total=False):
    """The fields of `SamplingParams`, as the types of keyword arguments."""

    temperature: float
    top_k: int
    top_p: float
    max_tokens: int
    ignore_eos: bool
    stop_token_ids: Collection[int]
    seed: int | None
    logprobs: int | None
    prompt_logprobs: int | None


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
