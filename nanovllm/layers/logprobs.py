"""Log-probabilities of raw logits, of the rows that ask; each rank has a part of the vocabulary.

A logit and its token are one integer that orders them, so of equal logits the lowest token comes
first, whoever looks. Ranks exchange the likeliest tokens of their parts and their log-sum-exps, and
then how many of theirs come before the token in question.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nanovllm.kernels.reference import NOTHING, key_of, value_of
from nanovllm.layers.parallel import ParallelGroup, Shard

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
        count: no more than the vocabulary has.
        group: this rank and the others.
        shard: of the vocabulary.
    """
    values = logits.float()
    ids = torch.arange(shard.start, shard.start + shard.size, device=logits.device)
    keys = key_of(values, values.dtype).bitwise_left_shift_(32).bitwise_or_(_LOW - ids)
    if shard.size < max(count, 1):  # a rank may even have no tokens
        missing = max(count, 1) - shard.size
        keys = torch.nn.functional.pad(keys, (0, missing), value=NOTHING)
    places, held = shard.find(tokens)
    own = torch.where(held, keys.gather(1, places[:, None])[:, 0], NOTHING)
    log_sum = values.logsumexp(1).double().view(torch.int64)
    packed = torch.cat([own[:, None], log_sum[:, None], keys.topk(count).values], 1)
    parts = group.gather(packed)
    key = parts[..., 0].amax(0)
    log_sum = parts[..., 1].contiguous().view(torch.float64).logsumexp(0)
    best = parts[..., 2:].transpose(0, 1).flatten(1).topk(count).values
    found = torch.cat([key[:, None], best], 1)
    logprobs = value_of(found >> 32, torch.float32) - log_sum[:, None]
    above = group.gather((keys > key[:, None]).sum(1)).sum(0)
    return Scores(_LOW - (found & _LOW), logprobs.float(), above + 1)
