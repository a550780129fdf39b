"""Attention by the flash-attn package (an optional extra).

Its paged cache is [blocks, block_size, kv_heads, head_dim]; it takes any strides, so it is given
a transposed view of ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, HeadShape, PrefillMetadata

# flash-attn 2 reads pages of whole multiples of this many tokens.
PAGE_MULTIPLE = 256


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

    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: DecodeMetadata, out: Tensor
    ) -> None:
        result = self.flash_attn.flash_attn_with_kvcache(
            q.unsqueeze(1),
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cache_seqlens=metadata.context_lens,
            block_table=metadata.block_tables,
            softmax_scale=self.heads.scale,
            causal=True,
        )
        out[:] = result.squeeze(1)

    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PrefillMetadata, out: Tensor
    ) -> None:
        lengths = metadata.context_lens
        cu_seqlens_k = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        longest = metadata.block_tables.shape[1] * k_cache.shape[2]
        out[:] = self.flash_attn.flash_attn_varlen_func(
            q,
            k_cache.transpose(1, 2),
            v_cache.transpose(1, 2),
            cu_seqlens_q=metadata.cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=metadata.max_seqlen_q,
            max_seqlen_k=longest,
            block_table=metadata.block_tables,
            softmax_scale=self.heads.scale,
            causal=True,
        )
