"""What a step scores for requests that ask for log-probabilities, and whose scores are whose."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import numpy as np

from nanovllm.engine.scheduler import Step
from nanovllm.engine.step_inputs import decode_first
from nanovllm.layers.logprobs import Scores
from nanovllm.logprobs import Position
from nanovllm.utils.joined import join


class Share(NamedTuple):
    """The next `length` scores go to `positions[place:]`, each with so many likeliest tokens."""

    positions: list[Position]
    place: int
    length: int
    likeliest: int


class Scoring(NamedTuple):
    """What a step scores; it is as `of` found it when the step was launched."""

    # For all ranks. Joined: how many of the likeliest tokens; rows among those that are drawn;
    # rows of prompts, among all tokens of the step; the tokens behind these.
    packed: np.ndarray
    shares: list[Share]  # of the drawn rows, then of the rows of prompts

    @classmethod
    def of(cls, step: Step, vocab_size: int) -> Scoring | None:
        """None if it scores nothing."""
        drawn, rows, following = list[int](), list[int](), list[int]()
        shares: list[Share] = []
        drawing = [chunk.seq for chunk in step.chunks if chunk.needs_sample]
        for row, seq in enumerate(drawing):
            if (likeliest := seq.params.logprobs) is not None:
                drawn.append(row)
                shares.append(Share(seq.logprobs, seq.num_generated - 1, 1, likeliest))
        first = 0
        for chunk in [] if step.is_decode else [step.chunks[i] for i in decode_first(step.chunks)]:
            seq, likeliest = chunk.seq, chunk.seq.params.prompt_logprobs
            # What an earlier run of a preempted request has found is kept.
            start = max(chunk.start, len(seq.prompt_logprobs))
            end = min(chunk.end, seq.prompt_len - 1)
            if likeliest is not None and start < end:
                row = first + start - chunk.start
                rows += range(row, row + end - start)
                following += seq.token_ids[start + 1 : end + 1]
                shares.append(Share(seq.prompt_logprobs, start, end - start, likeliest))
            first += chunk.end - chunk.start
        if not shares:
            return None
        most = min(max(share.likeliest for share in shares), vocab_size)
        arrays = [most], drawn, rows, following
        return cls(join(np.array(array, np.int64) for array in arrays), shares)

    def hand_out(self, scores: Scores) -> None:
        """Notes scores, which are on the host, with their requests, before the drawn tokens are.

        A score stands where its token does, so nothing is there twice if the step is broken off
        and the token drawn again.
        """
        found = zip(*(part.tolist() for part in scores), strict=True)
        for positions, place, length, likeliest in self.shares:
            width = 1 + likeliest
            positions[place:] = [
                Position(tokens[:width], logprobs[:width], rank)
                for tokens, logprobs, rank in islice(found, length)
            ]
