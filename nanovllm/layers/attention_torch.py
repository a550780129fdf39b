"""Attention in plain torch: slow and obvious."""

from __future__ import annotations

import torch

from nanovllm.kernels import reference
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, PrefillMetadata


class TorchBackend(AttentionBackend):
    """The reference that the other back ends are tested against."""

    def decode(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: DecodeMetadata,
        out: torch.Tensor,
    ) -> None:
        out[:] = reference.paged_decode_attention(
            q, k_cache, v_cache, metadata.block_tables, metadata.context_lens, self.heads.scale
        )

    def prefill(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: PrefillMetadata,
        out: torch.Tensor,
    ) -> None:
        out[:] = reference.paged_prefill_attention(
            q,
            k_cache,
            v_cache,
            metadata.block_tables,
            metadata.cu_seqlens_q,
            metadata.context_lens,
            metadata.max_seqlen_q,
            self.heads.scale,
        )
