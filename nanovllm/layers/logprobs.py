"""Log-probabilities of raw logits, of the rows that ask; each rank has a part of the vocabulary.

A logit and its token are one integer that orders them, so of equal logits the lowest token comes
first, whoever looks. Ranks exchange the likeliest tokens of their parts and their log-sum-exps, and
then how many of theirs come before the token in question.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm import kernels
from nanovllm.kernels.reference_sampling import NOTHING, key_of, value_of
from nanovllm.layers.parallel import ParallelGroup, Shard

# Of each rank's part.
MOST_LIKELY = 32
_LOW = 0xFFFFFFFF


class Scores(NamedTuple):
    """Of R rows: the token in question, then the N likeliest ones, the likeliest first."""

    tokens: Tensor  # int64 [R, 1 + N]
    logprobs: Tensor  # float32 [R, 1 + N]
    ranks: Tensor  # int64 [R], of the token in question, from 1


def score(logits: Tensor, tokens: Tensor, count: int, group: ParallelGroup, shard: Shard) -> Scores:
    """Scores `tokens` and the `count` likeliest tokens.

    Args:
        logits: [R, this rank's part of the vocabulary], any float dtype.
        tokens: int64 [R]; one outside the vocabulary has a meaningless score.
        count: no more than MOST_LIKELY, nor than the vocabulary has.
    """
    if shard.size < MOST_LIKELY:  # a rank may even have no tokens
        logits = torch.nn.functional.pad(logits, (0, MOST_LIKELY - shard.size), value=-math.inf)
    places, held = shard.find(tokens)
    own = _keys(logits.gather(1, places[:, None])[:, 0].float(), tokens)
    log_sum = logits.float().logsumexp(1).double().view(torch.int64)
    parts = [torch.where(held, own, NOTHING)[:, None], log_sum[:, None]]
    if count:
        parts.append(_likeliest(logits, shard).topk(count).values)
    everyone = group.gather(torch.cat(parts, 1))
    key = everyone[..., 0].amax(0)
    log_sum = everyone[..., 1].contiguous().view(torch.float64).logsumexp(0)
    best = everyone[..., 2:].transpose(0, 1).flatten(1).topk(count).values
    found = torch.cat([key[:, None], best], 1)
    logprobs = value_of(found >> 32, torch.float32) - log_sum[:, None]
    above = group.gather(_above(logits, key, shard)).sum(0)
    return Scores(_LOW - (found & _LOW), logprobs.float(), above + 1)


def _keys(values: Tensor, tokens: Tensor) -> Tensor:
    """int64 that order tokens by their float32 logits, and equal ones by number."""
    return (key_of(values, torch.float32) << 32) | (_LOW - tokens)


def _likeliest(logits: Tensor, shard: Shard) -> Tensor:
    """Keys of the MOST_LIKELY likeliest tokens of this rank, in any order: [R, MOST_LIKELY]."""
    rows = torch.arange(len(logits), device=logits.device)
    lowest = torch.finfo(logits.dtype).min
    # Tokens of no probability are the last, but are tokens.
    logits = logits.nan_to_num(nan=lowest, neginf=lowest, posinf=math.inf)
    threshold = kernels.find_threshold(
        logits, torch.ones_like(rows, dtype=torch.float32), rows,
        torch.full_like(rows, MOST_LIKELY), None,
    )  # fmt: skip
    values, places = kernels.collect(logits, rows, threshold, MOST_LIKELY)
    keys = _keys(torch.where(values == lowest, -math.inf, values), places.long() + shard.start)
    return torch.where((places >= 0) & (places < shard.size), keys, NOTHING)


def _above(logits: Tensor, key: Tensor, shard: Shard) -> Tensor:
    """How many of this rank's tokens come before the one with this key: [R]."""
    value = value_of(key >> 32, torch.float32).to(logits.dtype)[:, None]
    last = (_LOW - (key & _LOW)).clamp(max=shard.start + shard.size)[:, None] - shard.start
    lower = torch.arange(logits.shape[1], device=logits.device) < last
    return ((logits > value) | ((logits == value) & lower)).sum(1)
