"""The ranks that share one model: their collectives, and which part of each weight is whose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nanovllm.layers.peer_memory import PeerMemory
from nanovllm.utils.waiting import complete

# torch 2.13 renamed it, and warns about the old name.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Norm(Protocol):
    """An RMS norm; see layers/layernorm.py."""

    eps: float

    @property
    def weight(self) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class ParallelGroup:
    """Rank `rank` of `size`.

    Attributes:
        rank, size: of this process.
        process_group: None when there is only one rank.
        timeout: seconds that a rank's CPU waits for the others in a collective.
        peers: memory that all ranks reach, for faster collectives than the process group's.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None
    timeout: float = 60.0
    peers: PeerMemory | None = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sums `x` over the ranks, in place.

        Raises:
            TimeoutError: a rank is silent (on the CPU; CUDA's collectives have only been issued).
        """
        if self.size > 1:
            self._complete(dist.all_reduce(x, group=self.process_group, async_op=True), x)
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's `x`, [size, *x.shape], in rank order, on every rank.

        Raises:
            TimeoutError: as `all_reduce`.
        """
        if self.size == 1:
            return x[None]
        if self.peers is not None and (gathered := self.peers.gather(x)) is not None:
            return gathered
        parts = x.new_empty(self.size, *x.shape)
        self._complete(
            _gather(parts.flatten(0, 1), x.contiguous(), group=self.process_group, async_op=True),
            x,
        )
        return parts

    def add_norm(
        self,
        compute: Callable[[Tensor | None], Tensor],
        turn: int,
        first: int,
        residual: Tensor,
        norm: Norm,
    ) -> tuple[Tensor, Tensor]:
        """Returns (norm of s, s) for s = the sum of all ranks' parts + residual [T, H].

        NOTE: s may be written over the residual, and is right only in the rows that the next
        call's sum needs on this rank.

        Args:
            compute: gives this rank's part, in the tensor that it gets, if it gets one.
            turn: which all-reduce of a layer, from 0; the embedding's is the last.
            first: place of the first row among those of the step.
            residual, norm: see above.
        """
        if self.peers is not None:
            part = self.peers.part(turn, first, len(residual))
            if part is not None:
                compute(part)
                y = self.peers.add_norm(part, turn, first, residual, norm.weight, norm.eps)
                return y, residual
        return norm.add(self.all_reduce(compute(None)), residual)

    def _complete(self, work: dist.Work, x: torch.Tensor) -> None:
        if x.is_cuda:
            work.wait()  # the current stream does
        else:
            complete(work, self.timeout)


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
    def of_tiles(cls, full: int, tile: int, group: ParallelGroup) -> Shard:
        """Equally many tiles, rounded up, so the last ranks may have fewer entries or none."""
        tiles = cls.of(-(-full // tile), group)
        start = min(tiles.start * tile, full)
        return cls(full, start, min(tiles.size * tile, full - start))

    @classmethod
    def of_kv_heads(cls, num_heads: int, head_dim: int, group: ParallelGroup) -> Shard:
        """Rows of whole KV heads; with more ranks than heads, several ranks hold the same head."""
        if num_heads >= group.size:
            return cls.of(num_heads * head_dim, group)
        head = group.rank * num_heads // group.size
        return cls(num_heads * head_dim, head * head_dim, head_dim)

    @property
    def span(self) -> slice:
        return slice(self.start, self.start + self.size)

    def find(self, entries: Tensor, elsewhere: int = 0) -> tuple[Tensor, Tensor]:
        """The place of entries within this part, or `elsewhere`, and whether they are within it."""
        places = entries - self.start
        held = (places >= 0) & (places < self.size)
        return torch.where(held, places, elsewhere), held


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
            index[self.dim] = self.shard.span
        return tuple(index)


# A layer's checkpoint tensors by name.
WeightShards = Iterator[tuple[str, WeightShard]]
