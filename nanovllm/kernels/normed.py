"""Arguments of several tensors that the fused operations take or return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Normed(NamedTuple):
    """The output of an RMS norm, whose division by the root mean square may be deferred.

    The division is a factor of the whole row, so it commutes with a linear layer. Where no program
    has seen a whole row yet, the linear layer after the norm divides its own output.
    """

    values: Tensor  # [T, H], x / rms(x) * weight; or x * weight if there is a sum_sq
    sum_sq: Tensor | None = None  # float32 [T, P], whose sum over P is the row's sum of x^2
    eps: float = 0.0
    after_all_reduce: bool = False  # which mostly waits for other GPUs, so memory is idle

    def materialize(self) -> Tensor:
        """``[T, H]``, the division done."""
        if self.sum_sq is None:
            return self.values
        mean = self.sum_sq.sum(1, keepdim=True) / self.values.shape[1]
        return (self.values.float() * torch.rsqrt(mean + self.eps)).to(self.values.dtype)


class HeadInputs(NamedTuple):
    """What the heads of T tokens need between QKV projection and attention."""

    q_weight: Tensor | None  # [D], norm of every query head; None: the model has none
    k_weight: Tensor | None
    eps: float  # of these norms
    cos_sin: Tensor  # float32 [max_pos, D], D/2 cosines and then D/2 sines of every position
    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # [T], cache slot of each token
    k_cache: Tensor  # [num_blocks, Hkv, block_size, D]
    v_cache: Tensor
    num_q_heads: int
    num_kv_heads: int
