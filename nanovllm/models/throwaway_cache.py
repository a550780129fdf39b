"""A KV cache for one call, where a model is called with whole sequences and no cache of theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanovllm.layers.attention import AttentionMetadata, PrefillMetadata
from nanovllm.models.stage import Model

# Block sizes are multiples of it: all back ends take them, and kernels are compiled for few.
BLOCK_MULTIPLE = 256


@contextmanager
def throwaway_cache(model: Model, positions: Tensor) -> Iterator[AttentionMetadata]:
    """Binds a cache to `model` that holds each sequence in a block; afterwards, the old one again.

    The layers share one layer's memory: a layer has read its keys and values before the next layer
    of the same sequence writes its own.

    Yields the metadata of the tokens at `positions`, integer [T]; each 0 begins a sequence.

    Raises:
        ValueError: positions that do not count up from 0 in each sequence, or go too far.
    """
    starts = sequence_starts(positions)
    lengths = starts.diff()
    sequence, longest = torch.repeat_interleave(lengths), int(lengths.max())
    if longest > model.max_length:
        raise ValueError(
            f"positions up to {longest - 1} are not allowed: they must be below "
            f"{model.max_length}, the length of the longest sequence"
        )
    block_size = -(-longest // BLOCK_MULTIPLE) * BLOCK_MULTIPLE
    tables = torch.arange(len(lengths), dtype=torch.int32, device=positions.device)[:, None]
    slots = (sequence * block_size + positions).to(torch.int32)

    bound, heads, weight = model.kv_cache, model.backend.heads, next(model.parameters())
    cache = weight.new_zeros(1, 2, len(lengths), heads.num_kv_heads, block_size, heads.head_dim)
    model.bind_kv_cache(cache.expand(len(bound), -1, -1, -1, -1, -1))
    try:
        yield AttentionMetadata(slots, prefill=PrefillMetadata(tables, lengths, starts, longest))
    finally:
        model.bind_kv_cache(bound)


def sequence_starts(positions: Tensor) -> Tensor:
    """int32 [N + 1]: the first token of each sequence, and the end of the last."""
    first = positions.flatten() == 0
    follows = positions.flatten().diff() == 1
    if positions.ndim != 1 or not (first[:1].any() and (first[1:] | follows).all()):
        raise ValueError(
            "positions must count up from 0 in each sequence where there is no metadata to say "
            "what the KV cache holds"
        )
    ends = positions.new_tensor([len(positions)])
    return torch.cat([first.nonzero().flatten(), ends]).to(torch.int32)
