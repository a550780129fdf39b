"""Changes of logits before a token is drawn: bias, penalties, masks, and min_p.

Rows that ask for a change are copied in float32, and the copy is changed. So the model's logits
stay as they are, and a small penalty is not rounded away in 16 bits. The order is vLLM's:

    logit_bias and min_tokens    + bias; -inf for the tokens that would end the request
    repetition_penalty           logits above 0 / penalty, others * penalty   (arXiv:1909.05858)
    frequency_, presence_        - penalty * times generated, - penalty if generated
    json_schema, regex, grammar  -inf for the tokens that may not follow
    min_p                        -inf for what is less likely than min_p times the likeliest
                                 (arXiv:2407.01082)
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.sampling_params import SamplingParams

# Columns behind a copy's part of the vocabulary: the first stands for all tokens of other ranks.
# So many keep rows as well aligned as those of the model.
SPARE = 16
# Rows that are masked at a time: they take some 100 bytes a row and token in between.
MASKED_ROWS = 16

Bias = tuple[np.ndarray, np.ndarray]
"""Token ids, int64, and what is added to their logits, float32."""


@dataclass(frozen=True, eq=False)
class RequestEdits:
    """What one request changes of its logits; a structure has masks for its tokens beside these."""

    penalties: tuple[float, float, float] | None  # of repetition, frequency and presence
    margin: float  # what is so far below the highest logit, a number up to 0, is too unlikely
    min_tokens: int  # until so many tokens are generated, `first_bias` is added, then `bias`
    first_bias: Bias
    bias: Bias

    @classmethod
    def of(
        cls, params: SamplingParams, end_ids: Collection[int], vocab_size: int
    ) -> RequestEdits | None:
        """Those that `params` asks for, if any; `end_ids` are the tokens that end the request."""
        repetition = max(params.repetition_penalty, float(np.finfo(np.float32).tiny))
        penalties = repetition, params.frequency_penalty, params.presence_penalty
        penalised = penalties != (1, 0, 0)
        bias = dict(params.logit_bias or ())
        limited = params.min_p > 0 and params.temperature > 0
        structured = params.structure is not None
        # Of a structured request the end is the only token that may be drawn where it may be.
        min_tokens = 0 if structured else params.min_tokens
        if not (penalised or bias or limited or min_tokens or structured):
            return None
        ends = {token: -math.inf for token in end_ids if token < vocab_size}
        return cls(
            penalties if penalised else None,
            math.log(params.min_p) * params.temperature if limited else -math.inf,
            min_tokens,
            _bias_of(bias | ends),
            _bias_of(bias),
        )

    def bias_at(self, num_generated: int) -> Bias:
        return self.first_bias if num_generated < self.min_tokens else self.bias

    def change(self, num_generated: int) -> bool:
        """Whether anything changes for the token after so many."""
        has_bias = len(self.bias_at(num_generated)[0]) > 0
        return self.penalties is not None or self.margin > -math.inf or has_bias


def _bias_of(bias: dict[int, float]) -> Bias:
    # Not by numpy, which warns of numbers that are -inf in float32.
    values = torch.tensor(list(bias.values()), dtype=torch.float32, device="cpu")
    return np.array(list(bias), np.int64), values.numpy()


class EditBatch(NamedTuple):
    """Changes of E rows; the first P of them have penalties. Arrays to pack, tensors to use."""

    rows: Any  # int64 [E], which rows of the step's logits
    margins: Any  # float32 [E], or none if no row has one
    biased: Any  # int64 [B], among the E rows
    bias_ids: Any  # int64 [B], tokens
    biases: Any  # float32 [B]
    request_index: Any  # int64 [P]
    lengths: Any  # int64 [P], tokens before the draw
    prompt_lengths: Any  # int64 [P], of those
    penalties: Any  # float32 [3 * P], all of repetition first
    masked: Any  # int64 [M], among the E rows
    masks: Any  # int32 [M * W], see `forbid`


def edit(
    logits: Tensor, batch: EditBatch, history: Tensor, group: ParallelGroup, shard: Shard
) -> Tensor:
    """Changed copies of rows of `logits` [S, this rank's part of the vocabulary].

    Args:
        history: integer [P, longest], the tokens of the rows with penalties; what is behind the
            length of a row is not looked at.

    Returns:
        float32 [E, this rank's part], a view of rows that are SPARE longer.
    """
    shape = len(batch.rows), shard.size + SPARE
    copy = torch.full(shape, -math.inf, dtype=torch.float32, device=logits.device)
    copy[:, : shard.size] = logits[batch.rows]
    if len(batch.biased):
        columns, _ = shard.find(batch.bias_ids, elsewhere=shard.size)
        copy[batch.biased, columns] += batch.biases
    if len(batch.lengths):
        _penalise(copy[: len(batch.lengths)], batch, history, shard)
    if len(batch.masked):
        forbid(copy, batch.masked, batch.masks.view(len(batch.masked), -1), shard)
    if len(batch.margins):
        # In float64, as ranks exchange values of 8 bytes.
        highest = group.gather(copy.amax(1).double()).amax(0).float()
        copy.masked_fill_(copy < (highest + batch.margins)[:, None], -math.inf)
    return copy[:, : shard.size]


def _penalise(copy: Tensor, batch: EditBatch, history: Tensor, shard: Shard) -> None:
    """Changes the logits of the tokens in `history`; equal tokens of a row get equal values."""
    places = torch.arange(history.shape[1], device=history.device)
    known = places < batch.lengths[:, None]
    columns, _ = shard.find(torch.where(known, history, -1).long(), elsewhere=shard.size)
    generated = (places >= batch.prompt_lengths[:, None]).float()
    # Whole numbers below 2**24, so their sums are exact in any order.
    counts = torch.zeros_like(copy).scatter_add_(1, columns, generated).gather(1, columns)
    repetition, frequency, presence = batch.penalties.view(3, -1, 1)
    values = copy.gather(1, columns)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values = values - frequency * counts - presence * (counts > 0)
    copy.scatter_(1, columns, values)


def forbid(logits: Tensor, rows: Tensor, masks: Tensor, shard: Shard) -> None:
    """Makes logits of tokens that are not allowed -inf.

    Args:
        logits: [S, this rank's part of the vocabulary, or more].
        rows: int64 [R], those that have a mask.
        masks: int32 [R, W], for each row W = ceil(V / 32) integers with a bit a token, 1 if it is
            allowed: token t is bit t % 32 of integer t // 32.
    """
    tokens = torch.arange(shard.start, shard.start + shard.size, device=logits.device)
    for some, own in zip(rows.split(MASKED_ROWS), masks.split(MASKED_ROWS), strict=True):
        allowed = own[:, tokens // 32] >> (tokens % 32).int() & 1
        changed = logits[some, : shard.size].masked_fill(allowed == 0, -math.inf)
        logits[some, : shard.size] = changed
