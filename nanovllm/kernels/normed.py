"""Arguments of several tensors that the fused operations take or return."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Normed(NamedTuple):
    """The output of an RMS norm, whose division by the root mean square may be deferred.

    The division is a factor of the whole row, so it commutes with a linear layer. Where no program
    has seen a whole row yet, the linear layer after the norm divides its own output.

    Attributes:
        values: ``[T, H]``, ``x / rms(x) * weight``; or ``x * weight`` if there is a `sum_sq`.
        sum_sq: float32 ``[T, P]``; the sum of a row's P values is the row's sum of ``x^2``.
        eps: of the norm.
    """

    values: Tensor
    sum_sq: Tensor | None = None
    eps: float = 0.0

    def materialize(self) -> Tensor:
        """``[T, H]``, the division done."""
        if self.sum_sq is None:
            return self.values
        mean = self.sum_sq.sum(1, keepdim=True) / self.values.shape[1]
        return (self.values.float() * torch.rsqrt(mean + self.eps)).to(self.values.dtype)


class HeadInputs(NamedTuple):
    """What the heads of T tokens need between QKV projection and attention.

    Attributes:
        q_weight, k_weight: ``[D]``, RMS norm weights shared by all heads of their kind; None where
            a model does not normalise its heads.
        eps: of these norms.
        cos_sin: ``[max_pos, D]`` float32, D/2 cosines and then D/2 sines of every position.
        positions: ``[T]`` int64.
        slot_mapping: ``[T]``, cache slot of each token.
        k_cache, v_cache: ``[num_blocks, Hkv, block_size, D]``.
        num_q_heads, num_kv_heads: Hq and Hkv.
    """

    q_weight: Tensor | None
    k_weight: Tensor | None
    eps: float
    cos_sin: Tensor
    positions: Tensor
    slot_mapping: Tensor
    k_cache: Tensor
    v_cache: Tensor
    num_q_heads: int
    num_kv_heads: int
