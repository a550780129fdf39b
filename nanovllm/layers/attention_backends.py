"""Attention in plain torch, and the choice of a back end.

Each other back end is imported only when chosen, for what its package needs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.kernels import reference
from nanovllm.layers.attention import (
    AttentionBackend,
    DecodeMetadata,
    HeadShape,
    KVCache,
    PrefillMetadata,
)


class TorchBackend(AttentionBackend):
    """The slow and obvious reference that the other back ends are tested against."""

    def decode(self, q: Tensor, cache: KVCache, metadata: DecodeMetadata, out: Tensor) -> None:
        starts = torch.arange(len(q) + 1)
        rows = PrefillMetadata(metadata.block_tables, metadata.context_lens, starts, 1)
        self.prefill(q, cache, rows, out)

    def prefill(self, q: Tensor, cache: KVCache, metadata: PrefillMetadata, out: Tensor) -> None:
        m, scale = metadata, self.heads.scale
        out[:] = reference.paged_prefill_attention(
            q, *cache, m.block_tables, m.cu_seqlens_q, m.context_lens, m.max_seqlen_q, scale
        )


def make_backend(
    name: str, heads: HeadShape, device: torch.device, block_size: int
) -> AttentionBackend:
    """Builds back end `name`; "auto" is "triton" on CUDA and "torch" elsewhere.

    Raises:
        ValueError: the back end cannot run on this device, or with this block size.
        ImportError: its package is not installed.
    """
    if name == "auto":
        name = "triton" if device.type == "cuda" else "torch"
    if name == "torch":
        return TorchBackend(heads)
    if device.type != "cuda":
        raise ValueError(
            f"attention_backend={name!r} is not allowed on device {device}: it needs CUDA; "
            "use 'auto' or 'torch'"
        )
    if name == "triton":
        from nanovllm.layers.attention_triton import TritonBackend

        return TritonBackend(heads)
    from nanovllm.layers.attention_flash import FlashAttnBackend

    return FlashAttnBackend(heads, block_size)
