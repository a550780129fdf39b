"""Where each tensor of a checkpoint goes.

A layer lists its slots under the names that checkpoints use; the loader (utils/loader.py) fills
them without knowing anything of packing, sharding or the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanovllm.layers.parallel import Shard


@dataclass(frozen=True)
class Slot:
    """The destination of one checkpoint tensor.

    Attributes:
        target: view into a parameter that takes this rank's part.
        shape: shape of the whole tensor in the checkpoint.
        dim: dimension that is split over the ranks.
        start: first entry of this rank's part along `dim`.
    """

    target: torch.Tensor
    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0

    @classmethod
    def whole(cls, target: torch.Tensor) -> Slot:
        """A tensor that every rank holds in full."""
        return cls(target, tuple(target.shape))

    @classmethod
    def sharded(cls, target: torch.Tensor, dim: int, shard: Shard) -> Slot:
        """A tensor of which `target` takes the entries of `shard` along `dim`."""
        shape = list(target.shape)
        shape[dim] = shard.full
        return cls(target, tuple(shape), dim, shard.start)


Slots = Iterator[tuple[str, Slot]]
