"""Draws that the last bits of logits decide, which tests of random requests do without.

Sums in another order, as of other batches or ranks, have other last bits. Where two tokens are as
good as equal, these decide which is drawn; once in some 100,000 draws no side is wrong.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from nanovllm.engine import draws
from nanovllm.layers.sampler import SamplingBatch
from nanovllm.layers.split_threshold import Limits

# Many times as much as logits of float32 differ: by 2e-5 in the worst of 300 random models.
CLOSE = 1e-4
TIMES = 24  # what any of these would miss, one of them in 2 ** 24 does


@contextmanager
def counting_close_draws() -> Iterator[list[int]]:
    """In a list, how many tokens of each draw of an engine would be others for other last bits.

    For engines of one rank; also counted are draws that a request's changes of its logits undo.
    """
    counts: list[int] = []
    sample = draws.sample

    def watched(logits: torch.Tensor, batch: SamplingBatch, *where: Any) -> torch.Tensor:
        tokens = sample(logits, batch, *where)
        nearby = logits.repeat(TIMES, 1).float()
        nearby += CLOSE * torch.randn(nearby.shape)
        others = sample(nearby, repeated(batch), *where).view(TIMES, -1)
        counts.append(int((others != tokens).any(0).sum()))
        return tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draws, "sample", watched)
        yield counts


def repeated(batch: SamplingBatch) -> SamplingBatch:
    """The options of the same rows TIMES times."""
    names = ("temperatures", "seeds", "steps", "request_index")
    fields: dict[str, Any] = {name: getattr(batch, name).repeat(TIMES) for name in names}
    if batch.limits is not None:
        rows, top_k, top_p = batch.limits
        every = torch.arange(TIMES)[:, None] * len(batch.seeds) + rows
        limits = (None if each is None else each.repeat(TIMES) for each in (top_k, top_p))
        fields["limits"] = Limits(every.flatten(), *limits)
    return replace(batch, **fields)
