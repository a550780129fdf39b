"""Attention in plain torch: slow and obvious."""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, PrefillMetadata


class TorchBackend(AttentionBackend):
    """The reference that the other back ends are tested against."""

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: DecodeMetadata, out: Tensor
    ) -> None:
        out[:] = reference.paged_decode_attention(
            q, k_cache, v_cache, metadata.block_tables, metadata.context_lens, self.heads.scale
        )

    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PrefillMetadata, out: Tensor
    ) -> None:
        m = metadata
        rows = m.block_tables, m.cu_seqlens_q, m.context_lens, m.max_seqlen_q
        out[:] = reference.paged_prefill_attention(q, k_cache, v_cache, *rows, self.heads.scale)
