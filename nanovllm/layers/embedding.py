"""Token embedding and output head, with the vocabulary split over the ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanovllm.layers.parallel import ParallelGroup, Shard, WeightShard, WeightShards


class VocabEmbedding(nn.Module):
    """One row of `hidden_size` per token; each rank holds an equal range of rows.

    The same matrix reads tokens in (`forward`) and writes logits out (`logits`), so a model with
    tied embeddings has one of these, any other model two.
    """

    def __init__(self, vocab_size: int, hidden_size: int, group: ParallelGroup) -> None:
        super().__init__()
        self.group = group
        self.shard = Shard.of(vocab_size, group)
        # Equally many rows on every rank, so that logits can be gathered; the last may be unused.
        rows = -(-vocab_size // group.size)
        self.weight = nn.Parameter(torch.empty(rows, hidden_size), requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Integer [T] to [T, hidden_size]."""
        if self.group.size == 1:
            return F.embedding(token_ids, self.weight)
        local = token_ids - self.shard.start
        held = (local >= 0) & (local < self.shard.size)
        rows = F.embedding(torch.where(held, local, 0), self.weight)
        return self.group.all_reduce(torch.where(held[:, None], rows, 0))

    def logits(self, hidden_states: Tensor, out: Tensor) -> None:
        """[T, hidden_size] to `out` [T, vocab_size], on every rank."""
        if self.group.size == 1:
            torch.mm(hidden_states, self.weight.t(), out=out)
        else:
            local = F.linear(hidden_states, self.weight)
            out.copy_(self.group.concat_last_dim(local)[:, : self.shard.full])

    def weight_shards(self, path: str) -> WeightShards:
        yield f"{path}.weight", WeightShard(self.weight[: self.shard.size], self.shard)
