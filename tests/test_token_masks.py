"""Masks of allowed tokens, against their definition, on any part of the vocabulary."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.kernels.reference import SAMPLE_TILE
from nanovllm.layers import token_masks
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.layers.sampler import SamplingBatch, sample


def random_masks(rows: list[int], vocab: int) -> tuple[np.ndarray, torch.Tensor]:
    """Masks for these rows, and the same as booleans [rows, V]; bits behind the last are noise."""
    allowed = torch.rand(len(rows), vocab) < torch.rand(len(rows), 1)
    allowed[:, random.randrange(vocab)] = True
    words = -(-vocab // 32)
    bits = torch.rand(len(rows), words * 32) < 0.5
    bits[:, :vocab] = allowed
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little").view("<i4")
    return np.concatenate([np.array(rows, np.int32), packed.astype(np.int32).ravel()]), allowed


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000, 2 * SAMPLE_TILE + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbidden_tokens_have_no_logits_and_nothing_else_changes(vocab, dtype):
    count = 3 * token_masks.ROWS
    rows = sorted(random.sample(range(count), random.choice([1, 5, count])))
    masks, allowed = random_masks(rows, vocab)
    logits = torch.randn(count, vocab).to(dtype)
    expected = logits.clone()
    for row, own in zip(rows, allowed, strict=True):
        expected[row, ~own] = float("-inf")
    shards = [Shard.of(vocab, ParallelGroup(rank, 3)) for rank in range(3)]
    parts = [logits[:, s.start : s.start + s.size].clone() for s in shards]
    for part, shard in zip(parts, shards, strict=True):
        token_masks.apply(part, torch.from_numpy(masks), shard)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=0)


def test_only_allowed_tokens_are_drawn_and_other_rows_draw_as_before():
    vocab, rows = 300, list(range(0, 40, 2))
    params = [SamplingParams(temperature=t, top_k=k) for t in (0, 1, 3) for k in (-1, 5)] * 7
    params = params[:40]
    packed = SamplingBatch.pack(params, range(40), [0] * 40, range(40), vocab)
    masks, allowed = random_masks(rows, vocab)
    shard = Shard(vocab, 0, vocab)
    logits = torch.randn(40, vocab)

    def draw(integers: np.ndarray) -> torch.Tensor:
        batch = SamplingBatch.unpack(integers, torch.device("cpu"))
        return sample(logits.clone(), batch, ParallelGroup(), shard)

    plain, masked = draw(packed), draw(np.concatenate([packed, masks]))
    assert masked[1::2].equal(plain[1::2])
    assert allowed[torch.arange(len(rows)), masked[rows]].all()
    assert not masked.equal(plain)
