"""``nanovllm.kernels.reference``, and what else kernels are held against."""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels.normed import HeadInputs
from nanovllm.kernels.reference import *  # noqa: F403
from nanovllm.kernels.reference import (
    add_rms_norm,
    paged_prefill_attention,
    qk_norm_rope_store,
    silu_mul,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of ``x [N, K]`` and ``weight [M, K]``, rounded once."""
    out = x.float() @ weight.float().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """``silu_mul(linear(x, weight))`` of ``weight [2I, K]``, rounded once -> ``[N, I]``."""
    return silu_mul(x.float() @ weight.float().T).to(x.dtype)


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm(linear(x, weight, bias), residual, norm_weight, eps)``."""
    return add_rms_norm(linear(x, weight, bias), residual, norm_weight, eps)


def linear_norm_rope_store(
    x: Tensor, weight: Tensor, bias: Tensor | None, inputs: HeadInputs
) -> Tensor:
    """``qk_norm_rope_store(linear(x, weight, bias), inputs)``."""
    return qk_norm_rope_store(linear(x, weight, bias), inputs)


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Prefill with one new token per sequence: ``q [N, Hq, D]``, ``context_lens`` at least 1."""
    starts, caches = torch.arange(len(q) + 1), (k_cache, v_cache)
    return paged_prefill_attention(q, *caches, block_tables, starts, context_lens, 1, scale)
