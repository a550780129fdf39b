"""Attention by our Triton kernels: the default on CUDA."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels.paged_decode import DecodeWorkspace, paged_decode_attention, tile_offsets
from nanovllm.kernels.paged_prefill import paged_prefill_attention
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, KVCache, PrefillMetadata


class TritonBackend(AttentionBackend):
    """Paged decode spread evenly over exactly the SMs it is given, and paged prefill.

    A plan is the running count of KV tiles, by which the programs of decode divide their work.
    """

    def make_workspace(self, device: torch.device, num_sms: int) -> DecodeWorkspace:
        h = self.heads
        return DecodeWorkspace(num_sms, h.num_q_heads, h.num_kv_heads, h.head_dim, device)

    def plan_size(self, num_seqs: int) -> int:
        return num_seqs + 1

    def plan(self, context_lens: np.ndarray) -> np.ndarray:
        return tile_offsets(context_lens)

    def decode(self, q: Tensor, cache: KVCache, metadata: DecodeMetadata, out: Tensor) -> None:
        m, scale = metadata, self.heads.scale
        paged_decode_attention(
            q, *cache, m.block_tables, m.context_lens, scale, m.plan, m.workspace, out
        )

    def prefill(self, q: Tensor, cache: KVCache, metadata: PrefillMetadata, out: Tensor) -> None:
        m, scale = metadata, self.heads.scale
        paged_prefill_attention(
            q, *cache, m.block_tables, m.cu_seqlens_q, m.context_lens, m.max_seqlen_q, scale, out
        )
