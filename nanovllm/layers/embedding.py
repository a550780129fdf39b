"""Token embedding and output head, with the vocabulary split over the ranks."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.kernels.reference_sampling import SAMPLE_TILE
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parallel import ParallelGroup, Shard, WeightShard, WeightShards

TURN = 2  # see ParallelGroup.add_norm


class VocabEmbedding(nn.Module):
    """One row of `hidden_size` per token; each rank holds a range of whole tiles of a draw.

    A model whose output head is tied to it has one of these, any other model two.
    """

    def __init__(self, vocab_size: int, hidden_size: int, group: ParallelGroup) -> None:
        super().__init__()
        self.group = group
        self.shard = Shard.of_tiles(vocab_size, SAMPLE_TILE, group)
        self.weight = nn.Parameter(torch.empty(self.shard.size, hidden_size), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Integer [T] to [T, hidden_size]."""
        return self.group.all_reduce(self._own_rows(token_ids))

    def normed(self, token_ids: Tensor, norm: RMSNorm, first: int) -> tuple[Tensor, Tensor]:
        """Returns (norm of x, x) for x = `forward`; see `ParallelGroup.add_norm` for the NOTE."""
        if self.group.size == 1:
            x = self.forward(token_ids)
            return norm(x), x
        residual = self.weight.new_zeros(len(token_ids), self.weight.shape[1])
        return self.group.add_norm(partial(self._own_rows, token_ids), TURN, first, residual, norm)

    def weight_shards(self, path: str) -> WeightShards:
        yield f"{path}.weight", WeightShard(self.weight, self.shard)

    def _own_rows(self, token_ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Rows of the tokens that this rank holds, zeros for the others."""
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        if self.shard.size == 0:
            zeros = self.weight.new_zeros(len(token_ids), self.weight.shape[1])
            return zeros if out is None else out.zero_()
        places, held = self.shard.find(token_ids)
        rows = F.embedding(places, self.weight)
        # Not a product: of a weight that is not finite, even zero times it is none.
        return torch.where(held[:, None], rows, rows.new_zeros(()), out=out)
