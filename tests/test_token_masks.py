"""Masks of allowed tokens, against their definition, on any part of the vocabulary."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.kernels.reference import SAMPLE_TILE
from nanovllm.layers import token_masks
from nanovllm.layers.logit_edits import EditBatch, RequestEdits, edit
from nanovllm.layers.parallel import ParallelGroup, Shard


def random_masks(rows: list[int], vocab: int) -> tuple[np.ndarray, torch.Tensor]:
    """Masks for these rows, and the same as booleans [rows, V]; bits behind the last are noise."""
    allowed = torch.rand(len(rows), vocab) < torch.rand(len(rows), 1)
    allowed[:, random.randrange(vocab)] = True
    words = -(-vocab // 32)
    bits = torch.rand(len(rows), words * 32) < 0.5
    bits[:, :vocab] = allowed
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little").view("<i4")
    return packed.astype(np.int32), allowed


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
        token_masks.apply(part, torch.tensor(rows), torch.from_numpy(masks), shard)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=0)


def test_masks_join_other_changes_and_the_logits_stay():
    vocab, rows = 300, [1, 4, 5]
    masks, allowed = random_masks(rows[1:], vocab)
    biased = SamplingParams(logit_bias={7: 1e6}, regex="x+")
    edits = [RequestEdits.of(params, [2], vocab) for params in (biased, biased, biased)]
    assert all(edits)
    packed = EditBatch.pack(rows, edits, [0, 0, 0], [], {1: masks[0], 2: masks[1]})
    logits = torch.randn(6, vocab)
    before = logits.clone()
    batch = EditBatch.unpack(packed, torch.device("cpu"))
    history = torch.empty(0, 0, dtype=torch.int32)
    changed = edit(logits, batch, history, ParallelGroup(), Shard(vocab, 0, vocab))
    expected = logits[rows].clone()
    expected[:, 7] += 1e6
    expected[1:][~allowed] = float("-inf")
    torch.testing.assert_close(changed, expected, rtol=0, atol=0)
    assert logits.equal(before)
