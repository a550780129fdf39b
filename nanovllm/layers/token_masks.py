"""Forbids tokens: the logits of those that a row may not draw become -inf."""

from __future__ import annotations

import torch

from nanovllm.layers.parallel import Shard

# Rows at a time: they take some 100 bytes a row and token in between.
ROWS = 16


def apply(logits: torch.Tensor, masks: torch.Tensor, shard: Shard) -> None:
    """Overwrites logits of tokens that are not allowed.

    Args:
        logits: [S, this rank's part of the vocabulary].
        masks: int32 [R * (1 + W)], the numbers of R rows, then for each W = ceil(V / 32) integers
            with a bit a token, 1 if it is allowed: token t is bit t % 32 of integer t // 32.
        shard: of the vocabulary.
    """
    words = -(-shard.full // 32)
    count = len(masks) // (1 + words)
    rows, bits = masks[:count].long(), masks[count:].view(count, words)
    tokens = torch.arange(shard.start, shard.start + shard.size, device=logits.device)
    for some, own in zip(rows.split(ROWS), bits.split(ROWS), strict=True):
        allowed = own[:, tokens // 32] >> (tokens % 32).int() & 1
        logits[some] = logits[some].masked_fill(allowed == 0, float("-inf"))
