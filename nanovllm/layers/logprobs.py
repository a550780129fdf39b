"""Log-probabilities of raw logits, of the rows that ask; each rank has a part of the vocabulary.

A logit and its token are one integer that orders them, so of equal logits the lowest token comes
first, whoever looks. Ranks exchange the likeliest tokens of their parts and their log-sum-exps, and
then how many of theirs come before the token in question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.reference import NOTHING, key_of, value_of
from nanovllm.layers.parallel import ParallelGroup, Shard

# Rows that are scored at a time: their logits are copied to float32 and to int64.
PIECE = 64
_LOW = 0xFFFFFFFF


class Scores(NamedTuple):
    """Of R rows: the token in question, then the N likeliest ones, the likeliest first."""

    tokens: Tensor  # int64 [R, 1 + N]
    logprobs: Tensor  # float32 [R, 1 + N]
    ranks: Tensor  # int64 [R], of the token in question, from 1


def pack(
    count: int, drawn: Sequence[int], prompt: Sequence[int], following: Sequence[int]
) -> np.ndarray:
    """What a step scores as int32, for one copy to the device and the other ranks.

    Args:
        count: how many of the likeliest tokens of each row; no more than the vocabulary has.
        drawn: rows among those that tokens are drawn from.
        prompt: rows among all tokens of the step.
        following: the tokens behind these.
    """
    return np.array([count, len(drawn), len(prompt), *drawn, *prompt, *following], np.int32)


def score_step(
    packed: np.ndarray,
    logits: Tensor,
    tokens: Tensor,
    prompt_logits: Callable[[Tensor], Tensor],
    group: ParallelGroup,
    shard: Shard,
) -> Scores:
    """Scores the drawn rows of a step, then its rows of prompts; the same on all ranks.

    Args:
        packed: see `pack`.
        logits: [S, this rank's part of the vocabulary].
        tokens: int64 [S], drawn from the logits.
        prompt_logits: gives the logits of rows among all tokens of the step.
        group: this rank and the others.
        shard: of the vocabulary.
    """
    count, num_drawn, num_prompt = packed[:3].tolist()
    rows = torch.from_numpy(packed[3:])
    if logits.is_cuda:
        rows = rows.pin_memory().to(logits.device, non_blocking=True)
    drawn, prompt, following = rows.long().split([num_drawn, num_prompt, num_prompt])

    def pieces() -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, num_drawn, PIECE):
            yield logits[drawn[i : i + PIECE]], tokens[drawn[i : i + PIECE]]
        for i in range(0, num_prompt, PIECE):
            yield prompt_logits(prompt[i : i + PIECE]), following[i : i + PIECE]

    scores = [score(*piece, count, group, shard) for piece in pieces()]
    return Scores(*map(torch.cat, zip(*scores, strict=True)))


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
    place = tokens - shard.start
    held = (place >= 0) & (place < shard.size)
    own = keys.gather(1, torch.where(held, place, 0)[:, None])[:, 0]
    own = torch.where(held, own, NOTHING)
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
