"""What is made of a step's logits: rank 0 says it, and every rank does it.

All rows are drawn as the model's logits say. Rows of requests that change their logits are then
drawn again, a few at a time, from changed copies (`layers/logit_edits.py`). So without such
requests there is nothing to do, and with them memory is bounded.

Penalties need the tokens so far, of which the host does not know the newest when it launches a
step. So all tokens of a request are written to the device once, when its first token since its
admission is drawn and the host knows all others; from then on the device appends what it draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.engine.scheduler import Step
from nanovllm.engine.scoring import Scoring
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.layers.logit_edits import EditBatch, edit
from nanovllm.layers.logprobs import Scores, score
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.layers.sampler import SamplingBatch, sample
from nanovllm.utils.device import to_device
from nanovllm.utils.joined import join, split

# Rows that are changed or scored at a time. They take some 10 bytes a logit in between; the peak
# that is measured has 8, of all sequences.
MOST_ROWS = 256
# Of prompts, whose logits are made for it.
PROMPT_ROWS = 64
NOTHING = np.empty(0, np.int32)


class Draws(NamedTuple):
    """What all ranks make of a step's logits, as int32 arrays; by default nothing."""

    sampling: np.ndarray = NOTHING  # how tokens are drawn, see `SamplingBatch.pack`
    # How logits are changed before. Joined pieces of up to MOST_ROWS rows; of each, the fields of
    # an `EditBatch`, the sampling of its rows, and for each request whose tokens the device lacks
    # its request_index and these.
    edits: np.ndarray = NOTHING
    scoring: np.ndarray = NOTHING  # which rows are scored, see `Scoring.packed`


NO_DRAWS = Draws()


@dataclass
class Sampler:
    """Draws and scores the tokens of one rank's steps."""

    # Hidden states [N, hidden size] -> logits [N, this rank's part of the vocabulary].
    compute_logits: Callable[[Tensor], Tensor]
    last_tokens: Tensor  # int64 [max_num_seqs], where that of each running request goes
    max_model_len: int
    group: ParallelGroup
    shard: Shard  # of the vocabulary

    def __post_init__(self) -> None:
        self.device = self.last_tokens.device
        # The tokens of running requests, by request_index; rows grow with the longest.
        self.history = torch.empty(len(self.last_tokens), 0, dtype=torch.int32, device=self.device)

    def pack(self, step: Step, masks: Mapping[int, np.ndarray], scoring: Scoring | None) -> Draws:
        """What `step` asks for, whose tokens are pending already; all ranks must `draw` it.

        `masks`: by row of logits, the tokens that may be drawn, see `logit_edits.forbid`.
        """
        seqs = [chunk.seq for chunk in step.chunks if chunk.needs_sample]
        sampling = self._pack_sampling(seqs) if seqs else NOTHING
        if not step.asks:
            return Draws(sampling)
        rows = [
            row
            for row, seq in enumerate(seqs)
            if seq.edits is not None and (row in masks or seq.edits.change(seq.num_generated - 1))
        ]
        rows.sort(key=lambda row: not _has_penalties(seqs[row]))
        pieces = [rows[i : i + MOST_ROWS] for i in range(0, len(rows), MOST_ROWS)]
        edits = [self._pack_edits(piece, [seqs[row] for row in piece], masks) for piece in pieces]
        return Draws(
            sampling,
            join(edits) if edits else NOTHING,
            NOTHING if scoring is None else scoring.packed,
        )

    def draw(
        self, logits: Tensor, draws: Draws, hidden: Tensor | None = None
    ) -> tuple[Tensor, Scores | None]:
        """Tokens [S], which are kept for the next step, and scores; the same on every rank.

        Args:
            logits: [S, this rank's part of the vocabulary] or more; they stay as they are.
            draws: from `pack`.
            hidden: [tokens, hidden size] of the step; needed if prompts are scored.
        """
        if len(draws.sampling):
            batch = SamplingBatch.unpack(draws.sampling, self.device)
            tokens = sample(logits[: len(batch.seeds)], batch, self.group, self.shard)
            for piece in split(draws.edits) if len(draws.edits) else ():
                edits, options, changed = self.change(logits, piece)
                drawn = sample(changed, options, self.group, self.shard)
                tokens[edits.rows] = drawn
                drawn = drawn[: len(edits.lengths)]
                self.history[edits.request_index, edits.lengths] = drawn.int()
            self.last_tokens[batch.request_index] = tokens
        else:
            tokens = torch.empty(0, dtype=torch.int64, device="cpu")
        scores = None
        if len(draws.scoring):
            scores = self._score(logits, hidden, draws.scoring, tokens)
        return tokens, scores

    def change(self, logits: Tensor, piece: np.ndarray) -> tuple[EditBatch, SamplingBatch, Tensor]:
        """What a piece of `Draws.edits` says, and changed copies of its rows, float32."""
        edits, sampling, *uploads = split(piece)
        longest = int(EditBatch(*split(edits)).lengths.max(initial=-1)) + 1
        width = self.history.shape[1]
        if longest > width:
            wanted = max(longest, min(2 * width, self.max_model_len))
            self.history = torch.nn.functional.pad(self.history, (0, wanted - width))
        for upload in uploads:
            row, tokens = int(upload[0]), upload[1:]
            self.history[row, : len(tokens)] = to_device(tokens, self.device)
        batch = EditBatch(*split(edits, self.device))
        history = self.history[:, :longest][batch.request_index]
        changed = edit(logits, batch, history, self.group, self.shard)
        return batch, SamplingBatch.unpack(sampling, self.device), changed

    def _score(
        self, logits: Tensor, hidden: Tensor | None, packed: np.ndarray, tokens: Tensor
    ) -> Scores:
        """Scores of the drawn rows, then of those of prompts."""
        _, drawn, prompt, following = split(packed, self.device)
        count = int(split(packed)[0][0])

        def pieces() -> Iterator[tuple[Tensor, Tensor]]:
            for i in range(0, len(drawn), MOST_ROWS):
                rows = drawn[i : i + MOST_ROWS]
                yield logits[rows], tokens[rows]
            for i in range(0, len(prompt), PROMPT_ROWS):
                rows = prompt[i : i + PROMPT_ROWS]
                assert hidden is not None
                yield self.compute_logits(hidden[rows]), following[i : i + PROMPT_ROWS]

        scores = [score(*piece, count, self.group, self.shard) for piece in pieces()]
        return Scores(*map(torch.cat, zip(*scores, strict=True)))

    def _pack_sampling(self, seqs: Sequence[EngineSequence]) -> np.ndarray:
        return SamplingBatch.pack(
            [seq.params for seq in seqs],
            [seq.seed for seq in seqs],
            [seq.num_generated - 1 for seq in seqs],
            [seq.request_index for seq in seqs],
            self.shard.full,
        )

    def _pack_edits(
        self,
        rows: Sequence[int],
        seqs: Sequence[EngineSequence],
        masks: Mapping[int, np.ndarray],
    ) -> np.ndarray:
        """A piece of `Draws.edits`; the first of these rows are those with penalties."""
        edits = [seq.edits for seq in seqs if seq.edits is not None]
        biases = [own.bias_at(seq.num_generated - 1) for own, seq in zip(edits, seqs, strict=True)]
        margins = [own.margin for own in edits]
        penalised = [seq for seq in seqs if _has_penalties(seq)]
        penalties = [own.penalties for own in edits[: len(penalised)]]
        masked = [place for place, row in enumerate(rows) if row in masks]
        batch = EditBatch(
            rows=_integers(rows),
            margins=np.array(margins if max(margins) > -np.inf else [], np.float32),
            biased=np.repeat(_integers(range(len(rows))), [len(ids) for ids, _ in biases]),
            bias_ids=np.concatenate([ids for ids, _ in biases]),
            biases=np.concatenate([values for _, values in biases]),
            request_index=_integers([seq.request_index for seq in penalised]),
            lengths=_integers([seq.length - 1 for seq in penalised]),
            prompt_lengths=_integers([seq.prompt_len for seq in penalised]),
            penalties=np.array(penalties, np.float32).T.ravel(),
            masked=_integers(masked),
            masks=np.concatenate([NOTHING, *(masks[rows[place]] for place in masked)]),
        )
        uploads = [
            np.array([seq.request_index, *seq.token_ids], np.int32)
            for seq in penalised
            if not seq.has_history
        ]
        for seq in penalised:
            seq.has_history = True
        return join([join(batch), self._pack_sampling(seqs), *uploads])


def _integers(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)


def _has_penalties(seq: EngineSequence) -> bool:
    return seq.edits is not None and seq.edits.penalties is not None
