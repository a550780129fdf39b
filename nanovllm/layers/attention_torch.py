"""Attention in plain torch: slow and obvious."""

from __future__ import annotations

from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, KVCache, PrefillMetadata


class TorchBackend(AttentionBackend):
    """The reference that the other back ends are tested against."""

    def decode(self, q: Tensor, cache: KVCache, metadata: DecodeMetadata, out: Tensor) -> None:
        rows = metadata.block_tables, metadata.context_lens
        out[:] = reference.paged_decode_attention(q, *cache, *rows, self.heads.scale)

    def prefill(self, q: Tensor, cache: KVCache, metadata: PrefillMetadata, out: Tensor) -> None:
        m = metadata
        keys, values = cache
        rows = m.block_tables, m.cu_seqlens_q, m.context_lens, m.max_seqlen_q
        out[:] = reference.paged_prefill_attention(q, keys, values, *rows, self.heads.scale)
