"""Draws the next tokens: temperature, top-k, top-p, and a seed of its own for every row.

Top-k and top-p become a threshold: the least logit that may be drawn. kernels/top_k_top_p.py finds
it on one GPU, split_threshold.py where ranks share a vocabulary, and kernels/sampling.py draws.
What they compute is said in kernels/reference_sampling.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm import kernels
from nanovllm.kernels.reference_sampling import token_of
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.layers.split_threshold import MOST_CANDIDATES, Limits, find_threshold
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.joined import join, split

# Below it a draw is greedy: the likeliest token has all the probability that float32 can tell, and
# logits divided by much less would overflow.
LOWEST_TEMPERATURE = 1e-5
# What is less is 0 in float32, and would leave no token.
LEAST_TOP_P = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling options of S rows, on the device of their logits."""

    temperatures: torch.Tensor  # float32 [S]
    seeds: torch.Tensor  # int64 [S]
    steps: torch.Tensor  # int64 [S], tokens that the request has drawn before
    request_index: torch.Tensor  # int64 [S], place among the last tokens of all requests
    limits: Limits | None = None  # None if no row has a top-k or top-p
    num_few: int = 0  # the first of these rows, with a top-k of at most MOST_CANDIDATES

    @staticmethod
    def pack(
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        steps: Sequence[int],
        request_index: Sequence[int],
        vocab_size: int,
    ) -> np.ndarray:
        """The options of S requests as int32, for one copy to the device and the other ranks."""
        values = [p.temperature if p.temperature >= LOWEST_TEMPERATURE else 0.0 for p in params]
        rows = [
            i
            for i, p in enumerate(params)
            if (0 < p.top_k < vocab_size or p.top_p < 1) and values[i] > 0
        ]
        rows.sort(key=lambda i: not 0 < params[i].top_k <= MOST_CANDIDATES)
        top_k = [k if 0 < (k := params[i].top_k) < vocab_size else vocab_size for i in rows]
        top_p = [max(params[i].top_p, LEAST_TOP_P) for i in rows]
        has_k, has_p = min(top_k, default=vocab_size) < vocab_size, min(top_p, default=1.0) < 1
        integers = seeds, steps, request_index, rows, top_k if has_k else []
        whole = (np.array(each, np.int64) for each in integers)
        nucleus = np.array(top_p if has_p else [], np.float32)
        return join([np.array(values, np.float32), *whole, nucleus])

    @classmethod
    def unpack(cls, packed: np.ndarray, device: torch.device) -> SamplingBatch:
        """The inverse of `pack`, on `device`, without waiting for it."""
        temperatures, seeds, steps, request_index, *limits = split(packed, device)
        rows, top_k, top_p = (each if len(each) else None for each in limits)
        if rows is None:
            return cls(temperatures, seeds, steps, request_index)
        # Counted on the host.
        num_few = 0 if top_k is None else int((split(packed)[-2] <= MOST_CANDIDATES).sum())
        options = temperatures, seeds, steps, request_index
        return cls(*options, Limits(rows, top_k, top_p), num_few)


def sample(
    logits: torch.Tensor, batch: SamplingBatch, group: ParallelGroup, shard: Shard
) -> torch.Tensor:
    """Draws a token from each row of [S, this rank's `shard` of the vocabulary]: int64 [S].

    All ranks of `group` draw the same.
    """
    options = batch.temperatures, batch.seeds, batch.steps
    limits, threshold = batch.limits, None
    if group.size == 1:
        if limits is not None:
            threshold = kernels.find_threshold(logits, batch.temperatures, *limits)
        return kernels.sample(logits, *options, threshold)
    if limits is not None:
        threshold = find_threshold(logits, batch.temperatures, limits, batch.num_few, group)
    keys = kernels.sample(logits, *options, threshold, (shard.start, shard.full))
    return token_of(group.gather(keys).amax(0))
