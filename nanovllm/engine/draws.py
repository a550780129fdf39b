"""How the tokens of a step are drawn: packed by rank 0, done by every rank.

All rows are drawn as the model's logits say. Rows of requests that change their logits are then
drawn again, a few at a time, from changed copies (`layers/logit_edits.py`). So without such
requests there is nothing to do, and with them memory is bounded.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.engine.token_history import TokenHistory
from nanovllm.layers.logit_edits import EditBatch, RequestEdits, edit
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.layers.sampler import SamplingBatch, sample
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.joined import join, split

# Rows that are copied and drawn at a time.
MOST_ROWS = 64


class Draws(NamedTuple):
    """What all ranks make of a step's logits, as rank 0 says it; int32 arrays, or None: nothing.

    Attributes:
        sampling: how tokens are drawn, see `SamplingBatch.pack`.
        edits: how logits are changed before, see `EditedDraws.pack`.
        scoring: which rows are scored, see `layers.logprobs.pack`.
    """

    sampling: np.ndarray | None = None
    edits: np.ndarray | None = None
    scoring: np.ndarray | None = None


NO_DRAWS = Draws()


def pack_sampling(seqs: Sequence[EngineSequence], vocab_size: int) -> np.ndarray | None:
    """How a token of each sequence is drawn, which is pending already; None: there are none."""
    if not seqs:
        return None
    return SamplingBatch.pack(
        [seq.params for seq in seqs],
        [seq.seed for seq in seqs],
        [seq.num_generated - 1 for seq in seqs],
        [seq.request_index for seq in seqs],
        vocab_size,
    )


class EditedDraws:
    """Draws the tokens of rows whose logits change.

    Attributes:
        asking: the edits of all requests that have some and still exist.
        history: the tokens of those that have penalties.
    """

    def __init__(
        self, max_num_seqs: int, max_model_len: int, shard: Shard, device: torch.device
    ) -> None:
        self.shard, self.device = shard, device
        self.asking: weakref.WeakSet[RequestEdits] = weakref.WeakSet()
        self.history = TokenHistory(max_num_seqs, max_model_len, device)

    def edits_of(self, params: SamplingParams, end_ids: Collection[int]) -> RequestEdits | None:
        """Of a new request, which `end_ids` end."""
        edits = RequestEdits.of(params, end_ids, self.shard.full)
        if edits is not None:
            self.asking.add(edits)
        return edits

    def pack(
        self, seqs: Sequence[EngineSequence], masks: Mapping[int, np.ndarray]
    ) -> np.ndarray | None:
        """How rows of logits change, one for each sequence, whose token is pending already.

        None: not at all. Counts on `draw` being called with the result, on every rank.

        Args:
            seqs: whose logits are the first rows.
            masks: by row, the tokens that may be drawn, see `token_masks`.
        """
        if not self.asking:
            return None
        rows = [
            row
            for row, seq in enumerate(seqs)
            if seq.edits is not None and (row in masks or seq.edits.change(seq.num_generated - 1))
        ]
        rows.sort(key=lambda row: not _has_penalties(seqs[row]))
        pieces = [rows[i : i + MOST_ROWS] for i in range(0, len(rows), MOST_ROWS)]
        packed = [self._pack_piece(piece, [seqs[row] for row in piece], masks) for piece in pieces]
        return join(packed) if packed else None

    def draw(
        self,
        logits: torch.Tensor,
        packed: np.ndarray,
        group: ParallelGroup,
        tokens: torch.Tensor,
    ) -> None:
        """Draws from changed logits, into `tokens`; `logits` are left as they are.

        Args:
            logits: [S, this rank's part of the vocabulary].
            packed: from `pack`.
            group: this rank and the others.
            tokens: int64 [S].
        """
        for piece in split(packed):
            edits, sampling, *uploads = split(piece)
            batch = EditBatch.unpack(edits, self.device)
            self.history.reserve(batch.longest)
            for upload in uploads:
                self.history.write(int(upload[0]), upload[1:])
            history = self.history.read(batch.request_index, batch.longest)
            edited = edit(logits, batch, history, group, self.shard)
            options = SamplingBatch.unpack(sampling, self.device)
            drawn = sample(edited, options, group, self.shard)
            tokens[batch.rows] = drawn
            penalised = len(batch.lengths)
            self.history.append(batch.request_index, batch.lengths, drawn[:penalised])

    def _pack_piece(
        self,
        rows: Sequence[int],
        seqs: Sequence[EngineSequence],
        masks: Mapping[int, np.ndarray],
    ) -> np.ndarray:
        """Changes, sampling, and the tokens that the device does not have yet."""
        penalised = [seq for seq in seqs if _has_penalties(seq)]
        uploads = [
            np.array([seq.request_index, *seq.token_ids], np.int32)
            for seq in penalised
            if not seq.has_history
        ]
        for seq in penalised:
            seq.has_history = True
        edits = EditBatch.pack(
            rows,
            [seq.edits for seq in seqs if seq.edits is not None],
            [seq.num_generated - 1 for seq in seqs],
            [(seq.request_index, seq.length - 1, seq.prompt_len) for seq in penalised],
            {place: masks[row] for place, row in enumerate(rows) if row in masks},
        )
        sampling = pack_sampling(seqs, self.shard.full)
        assert sampling is not None
        return join([edits, sampling, *uploads])


def _has_penalties(seq: EngineSequence) -> bool:
    return seq.edits is not None and seq.edits.penalties is not None
