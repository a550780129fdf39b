"""Attention by the flash-attn package (an optional extra)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from nanovllm.layers.attention import (
    AttentionBackend,
    DecodeMetadata,
    HeadShape,
    KVCache,
    PrefillMetadata,
)

PAGE_MULTIPLE = 256  # tokens; flash-attn 2 takes no other pages


class FlashAttnBackend(AttentionBackend):
    """flash_attn_with_kvcache for decode, flash_attn_varlen_func for prefill."""

    def __init__(self, heads: HeadShape, block_size: int) -> None:
        super().__init__(heads)
        try:
            import flash_attn
        except ImportError as error:
            raise ImportError(
                "attention_backend='flash_attn' needs the package flash-attn, which is not "
                "installed: pip install flash-attn, or use 'auto'"
            ) from error
        if block_size % PAGE_MULTIPLE:
            raise ValueError(
                f"kvcache_block_size={block_size} is not allowed with "
                f"attention_backend='flash_attn': it must be a multiple of {PAGE_MULTIPLE}"
            )
        self.flash_attn = flash_attn

    def decode(self, q: Tensor, cache: KVCache, metadata: DecodeMetadata, out: Tensor) -> None:
        result = self.flash_attn.flash_attn_with_kvcache(
            q.unsqueeze(1), *_as_pages(cache),
            cache_seqlens=metadata.context_lens, block_table=metadata.block_tables,
            softmax_scale=self.heads.scale, causal=True,
        )  # fmt: skip
        out[:] = result.squeeze(1)

    def prefill(self, q: Tensor, cache: KVCache, metadata: PrefillMetadata, out: Tensor) -> None:
        m = metadata
        out[:] = self.flash_attn.flash_attn_varlen_func(
            q, *_as_pages(cache),
            cu_seqlens_q=m.cu_seqlens_q, max_seqlen_q=m.max_seqlen_q,
            cu_seqlens_k=pad(m.context_lens.cumsum(0, dtype=m.context_lens.dtype), (1, 0)),
            max_seqlen_k=m.block_tables.shape[1] * cache[0].shape[2],
            block_table=m.block_tables, softmax_scale=self.heads.scale, causal=True,
        )  # fmt: skip


def _as_pages(cache: KVCache) -> KVCache:
    """Views of keys and values [blocks, block_size, kv_heads, head_dim]."""
    keys, values = cache
    return keys.transpose(1, 2), values.transpose(1, 2)
