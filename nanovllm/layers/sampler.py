"""Draws the next tokens: temperature, top-k, top-p, and a seed of its own for every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike

from nanovllm import kernels
from nanovllm.sampling_params import SamplingParams

# Below it a draw is greedy: the likeliest token has all the probability that float32 can tell, and
# logits divided by much less would overflow.
LOWEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling options of S rows, on the device of their logits."""

    temperatures: torch.Tensor  # float32 [S]
    seeds: torch.Tensor  # int64 [S]
    steps: torch.Tensor  # int64 [S], tokens that the request has drawn before
    request_index: torch.Tensor  # int64 [S], place among the last tokens of all requests
    # Of the rows with a top-k or top-p; None if there are none.
    filtered: torch.Tensor | None = None  # int64 [F], which rows
    top_k: torch.Tensor | None = None  # int64 [F], the vocabulary's size where there is no limit
    top_p: torch.Tensor | None = None  # float32 [F], 1 where there is no limit

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        seeds: list[int],
        steps: list[int],
        request_index: list[int],
        vocab_size: int,
        device: torch.device,
    ) -> SamplingBatch:
        """Brings the options of S requests to `device`."""
        values = [p.temperature if p.temperature >= LOWEST_TEMPERATURE else 0.0 for p in params]
        temperatures = _upload(values, device, np.float32)
        batch = cls(temperatures, *_upload([seeds, steps, request_index], device, np.int64))
        rows = [
            i
            for i, p in enumerate(params)
            if (0 < p.top_k < vocab_size or p.top_p < 1) and values[i] > 0
        ]
        if not rows:
            return batch
        top_k = [k if 0 < (k := params[i].top_k) < vocab_size else vocab_size for i in rows]
        top_p = [params[i].top_p for i in rows]
        return replace(
            batch,
            filtered=_upload(rows, device, np.int64),
            top_k=_upload(top_k, device, np.int64) if min(top_k) < vocab_size else None,
            top_p=_upload(top_p, device, np.float32) if min(top_p) < 1 else None,
        )


def sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """Logits [S, vocab_size] to tokens, int64 [S]."""
    threshold = None
    if batch.filtered is not None:
        threshold = kernels.find_threshold(
            logits, batch.temperatures, batch.filtered, batch.top_k, batch.top_p
        )
    return kernels.sample(logits, batch.temperatures, batch.seeds, batch.steps, threshold)


def _upload(values: ArrayLike, device: torch.device, dtype: DTypeLike) -> torch.Tensor:
    """Copies numbers to `device` without waiting for it."""
    host = torch.from_numpy(np.asarray(values, dtype))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
