"""Linear layers split over ranks: by columns (outputs), then by rows (inputs) with an all-reduce.

The scheme is Megatron-LM's (https://arxiv.org/abs/1909.08053): a column-parallel layer followed by
a row-parallel one needs a single all-reduce.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parallel import ParallelGroup, Shard, WeightShard, WeightShards


class PackedColumnLinear(nn.Module):
    """Weights of several projections of the same input, for one matrix product.

    `parts`: for each projection its name in checkpoints and this rank's rows.
    """

    def __init__(self, in_features: int, parts: dict[str, Shard], bias: bool = False) -> None:
        super().__init__()
        self.parts = parts
        rows = sum(shard.size for shard in parts.values())
        self.weight = nn.Parameter(torch.empty(rows, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None

    def weight_shards(self, path: str) -> WeightShards:
        """`path`: of this module; checkpoints have the parts in its place."""
        prefix, row = path.rpartition(".")[0], 0
        for name, shard in self.parts.items():
            rows = slice(row, row + shard.size)
            yield f"{prefix}.{name}.weight", WeightShard(self.weight[rows], shard)
            if self.bias is not None:
                yield f"{prefix}.{name}.bias", WeightShard(self.bias[rows], shard)
            row += shard.size


class RowLinear(nn.Module):
    """A projection whose input is split over the ranks and whose output is their sum."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        group: ParallelGroup,
        turn: int,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.group = group
        self.turn = turn  # which all-reduce of a layer is its own
        self.shard = Shard.of(in_features, group)
        self.weight = nn.Parameter(torch.empty(out_features, self.shard.size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, this rank's in_features] to [T, out_features], summed over the ranks."""
        return self.group.all_reduce(self._part(x))

    def add_norm(
        self, x: Tensor, residual: Tensor, norm: RMSNorm, first: int = 0, *, may_defer: bool = True
    ) -> tuple[kernels.Normed, Tensor]:
        """Returns (norm of s, s) for s = this layer's output + residual [T, out_features].

        `first`, and what becomes of the residual: see `ParallelGroup.add_norm`. `may_defer`: the
        norm's division may be left to who uses it.
        """
        if self.group.size > 1 or not may_defer:
            y, total = self.group.add_norm(partial(self._part, x), self.turn, first, residual, norm)
            return kernels.Normed(y, after_all_reduce=self.group.size > 1), total
        return kernels.linear_add_norm(x, self.weight, self.bias, residual, norm.weight, norm.eps)

    def _part(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        # One rank alone adds the bias, so that it enters the sum once.
        bias = self.bias if self.group.rank == 0 else None
        return kernels.linear(kernels.Normed(x), self.weight, bias, out)

    def weight_shards(self, path: str) -> WeightShards:
        yield f"{path}.weight", WeightShard(self.weight, self.shard, dim=1)
        if self.bias is not None:
            yield f"{path}.bias", WeightShard(self.bias)
