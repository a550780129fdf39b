"""What a step scores for requests that ask for log-probabilities, and whose scores are whose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np

from nanovllm.engine.scheduler import Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import decode_first
from nanovllm.layers.logprobs import Scores
from nanovllm.logprobs import Position
from nanovllm.utils.joined import join


class ScoredPrompt(NamedTuple):
    """Tokens of a prompt, by those before them: `start` to `end`; `row` is the step's first."""

    seq: Sequence
    row: int
    start: int
    end: int


@dataclass(frozen=True)
class Scoring:
    """What a step scores; it is as `step` said when it was launched.

    Attributes:
        drawn: requests whose drawn token is scored, by its row among all that are drawn.
        prompts: in the order of the step's tokens.
    """

    drawn: dict[int, Sequence]
    prompts: list[ScoredPrompt]

    @classmethod
    def of(cls, step: Step) -> Scoring | None:
        """None if it scores nothing."""
        drawing = (chunk.seq for chunk in step.chunks if chunk.needs_sample)
        drawn = {i: seq for i, seq in enumerate(drawing) if seq.params.logprobs is not None}
        prompts, row = [], 0
        for chunk in [] if step.is_decode else [step.chunks[i] for i in decode_first(step.chunks)]:
            seq = chunk.seq
            # What an earlier run of a preempted request has found is kept.
            start = max(chunk.start, len(seq.prompt_logprobs))
            end = min(chunk.end, seq.prompt_len - 1)
            if seq.scores_prompt and start < end:
                prompts.append(ScoredPrompt(seq, row + start - chunk.start, start, end))
            row += chunk.end - chunk.start
        return cls(drawn, prompts) if drawn or prompts else None

    def pack(self, vocab_size: int) -> np.ndarray:
        """Joined: how many of the likeliest tokens, drawn rows, rows of prompts, their next tokens.

        Drawn rows are among those that are drawn, rows of prompts among all tokens of the step.
        """
        counts = [seq.params.logprobs or 0 for seq in self.drawn.values()]
        counts += [seq.params.prompt_logprobs or 0 for seq, *_ in self.prompts]
        rows = [row + i for _, row, start, end in self.prompts for i in range(end - start)]
        following = [
            t for seq, _, start, end in self.prompts for t in seq.token_ids[start + 1 : end + 1]
        ]
        arrays = [min(max(counts), vocab_size)], list(self.drawn), rows, following
        return join(np.array(array, np.int64) for array in arrays)

    def hand_out(self, scores: Scores) -> None:
        """Notes scores, which are on the host, with their requests, before the drawn tokens are.

        A score stands where its token does, so nothing is there twice if the step is broken off
        and the token drawn again.
        """
        positions = map(Position, *(part.tolist() for part in scores))
        for seq in self.drawn.values():
            place = len(seq.token_ids) - seq.prompt_len
            seq.logprobs[place:] = _first(positions, 1, seq.params.logprobs)
        for seq, _, start, end in self.prompts:
            seq.prompt_logprobs[start:] = _first(positions, end - start, seq.params.prompt_logprobs)


def _first(positions: Iterator[Position], count: int, likeliest: int | None) -> list[Position]:
    """The next `count` positions, each with so many of the likeliest tokens."""
    width = 1 + (likeliest or 0)
    return [
        Position(tokens[:width], logprobs[:width], rank)
        for tokens, logprobs, rank in islice(positions, count)
    ]
