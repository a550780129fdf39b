"""Forbids tokens: the logits of those that a row may not draw become -inf."""

from __future__ import annotations

import torch

from nanovllm.layers.parallel import Shard

# Rows at a time: they take some 100 bytes a row and token in between.
ROWS = 16


def apply(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor, shard: Shard) -> None:
    """Overwrites logits of tokens that are not allowed.

    Args:
        logits: [S, this rank's part of the vocabulary, and columns behind it].
        rows: int64 [R], those that have a mask.
        masks: int32 [R, W], for each row W = ceil(V / 32) integers with a bit a token, 1 if it is
            allowed: token t is bit t % 32 of integer t // 32.
        shard: of the vocabulary.
    """
    tokens = torch.arange(shard.start, shard.start + shard.size, device=logits.device)
    for some, own in zip(rows.split(ROWS), masks.split(ROWS), strict=True):
        allowed = own[:, tokens // 32] >> (tokens % 32).int() & 1
        changed = logits[some, : shard.size].masked_fill(allowed == 0, float("-inf"))
        logits[some, : shard.size] = changed
