"""Log-probabilities of tokens, as completions hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Logprob(NamedTuple):
    """How likely a token was in its place.

    Attributes:
        logprob: natural logarithm of its probability by the model's own logits: before temperature
            and whatever else changes them.
        rank: 1 is the likeliest token; of equally likely ones the lowest id comes first.
        decoded_token: its text alone; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


class Position(NamedTuple):
    """The token in a place, then the likeliest ones there; `rank` is the first one's."""

    tokens: list[int]
    logprobs: list[float]
    rank: int

    def as_dict(self, text_of: Callable[[int], str | None]) -> dict[int, Logprob]:
        """By token id, the token in its place first, then the likeliest first."""
        ranks = [self.rank, *range(1, len(self.tokens))]
        return {
            token: Logprob(logprob, rank, text_of(token))
            for token, logprob, rank in zip(self.tokens, self.logprobs, ranks, strict=True)
        }
