"""RMS normalisation, alone or fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.layers.parallel import WeightShard, WeightShards


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x, [T, size]."""
        return kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (norm of x + residual, x + residual), both [T, size]."""
        return kernels.add_rms_norm(x, residual, self.weight, self.eps)

    def weight_shards(self, path: str) -> WeightShards:
        yield f"{path}.weight", WeightShard(self.weight)
