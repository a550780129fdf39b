"""How the tokens of one request are drawn, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanovllm.utils.options import boolean, check, hinting, integer, number, whole

# They would be taken for their characters, their bytes or their keys.
NOT_TOKEN_IDS = (str, bytes, bytearray, memoryview, Mapping)


def _token_ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, Iterable) and not isinstance(value, NOT_TOKEN_IDS):
        try:
            ids = [whole(token) for token in value]
        except Exception:  # an array of no dimension only looks like a sequence
            ids = [None]
        if all(token is not None and token >= 0 for token in ids):
            return tuple(ids)  # type: ignore[arg-type]
    raise ValueError("a sequence of token ids, integers of at least 0")


def _seed(value: Any) -> int | None:
    if value is None:
        return None
    seed = whole(value)
    if seed is not None and 0 <= seed < 2**63:
        return seed
    raise ValueError("None or an integer from 0 to 2**63 - 1")


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
        stop_token_ids: further tokens that end the request.
        seed: the same seed draws the same random numbers whatever else is in the batch; None:
            random.
    """

    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in RULES:
            object.__setattr__(self, name, check(self, RULES, name, getattr(self, name)))


RULES = {
    "temperature": number(0, 100),
    "top_k": integer(1, also=-1),
    "top_p": number(0, 1, open_low=True),
    "max_tokens": integer(1),
    "ignore_eos": boolean,
    "stop_token_ids": _token_ids,
    "seed": _seed,
}


def params_per_prompt(
    given: SamplingParams | Sequence[SamplingParams] | None, count: int, fields: dict[str, Any]
) -> list[SamplingParams]:
    """One `SamplingParams` for each of `count` prompts."""
    if fields and given is not None:
        raise TypeError(
            f"give either sampling_params or single options ({', '.join(fields)}), not both"
        )
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams(**fields)] * count
    if not isinstance(given, Iterable):
        raise TypeError(f"sampling_params={given!r} is neither a SamplingParams nor a list of them")
    params = list(given)
    for item in params:
        if not isinstance(item, SamplingParams):
            raise TypeError(f"sampling_params holds {item!r}, which is no SamplingParams")
    if len(params) != count:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts: give one, or one each"
        )
    return params
