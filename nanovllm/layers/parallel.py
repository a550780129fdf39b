"""The ranks that share one model: their collectives, and which part of each weight is whose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

# torch 2.13 renamed it, and warns about the old name.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@dataclass(frozen=True)
class ParallelGroup:
    """Rank `rank` of `size`; `process_group` is None when there is only one."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.process_group)
        return x

    def concat_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        """Joins every rank's [..., n] to [..., n * size], in rank order, on every rank."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        _gather(parts, x.contiguous(), group=self.process_group)
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2)


@dataclass(frozen=True)
class Shard:
    """A rank's part of one dimension: entries `start` to `start + size` of `full`."""

    full: int
    start: int
    size: int

    @classmethod
    def of(cls, full: int, group: ParallelGroup) -> Shard:
        """Equal parts rounded up, so the last rank may have fewer."""
        width = -(-full // group.size)
        start = min(group.rank * width, full)
        return cls(full, start, min(width, full - start))

    @classmethod
    def of_kv_heads(cls, num_heads: int, head_dim: int, group: ParallelGroup) -> Shard:
        """Rows of whole KV heads; with more ranks than heads, several ranks hold the same head."""
        if num_heads >= group.size:
            return cls.of(num_heads * head_dim, group)
        head = group.rank * num_heads // group.size
        return cls(num_heads * head_dim, head * head_dim, head_dim)


@dataclass(frozen=True)
class WeightShard:
    """Where this rank's part of a checkpoint tensor goes."""

    target: torch.Tensor  # view into a parameter
    shard: Shard | None = None  # the part of dimension `dim` that it takes; None: all of the tensor
    dim: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = list(self.target.shape)
        if self.shard is not None:
            shape[self.dim] = self.shard.full
        return tuple(shape)

    @property
    def index(self) -> tuple[slice, ...]:
        """Where `target` is in the whole tensor."""
        index = [slice(None)] * self.target.dim()
        if self.shard is not None:
            index[self.dim] = slice(self.shard.start, self.shard.start + self.shard.size)
        return tuple(index)


# A layer's checkpoint tensors by name.
WeightShards = Iterator[tuple[str, WeightShard]]
