"""Attention by our Triton kernels: the default on CUDA."""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.kernels.paged_decode import DecodeWorkspace, paged_decode_attention, tile_offsets
from nanovllm.kernels.paged_prefill import lengths_of_tilings, paged_prefill_attention
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, PrefillMetadata


class TritonBackend(AttentionBackend):
    """Paged decode spread evenly over exactly the SMs it is given, and paged prefill.

    A plan is the running count of KV tiles, by which the programs of decode divide their work.
    """

    def make_workspace(self, device: torch.device, num_sms: int) -> DecodeWorkspace:
        heads = self.heads
        return DecodeWorkspace(
            num_sms, heads.num_q_heads, heads.num_kv_heads, heads.head_dim, device
        )

    def plan_size(self, num_seqs: int) -> int:
        return num_seqs + 1

    def plan(self, context_lens: np.ndarray) -> np.ndarray:
        return tile_offsets(context_lens)

    def prefill_lengths(self, dtype: torch.dtype) -> list[int]:
        return lengths_of_tilings(self.heads.head_dim, dtype.itemsize)

    def decode(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: DecodeMetadata,
        out: torch.Tensor,
    ) -> None:
        paged_decode_attention(
            q,
            k_cache,
            v_cache,
            metadata.block_tables,
            metadata.context_lens,
            self.heads.scale,
            metadata.plan,
            metadata.workspace,
            out,
        )

    def prefill(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: PrefillMetadata,
        out: torch.Tensor,
    ) -> None:
        paged_prefill_attention(
            q,
            k_cache,
            v_cache,
            metadata.block_tables,
            metadata.cu_seqlens_q,
            metadata.context_lens,
            metadata.max_seqlen_q,
            self.heads.scale,
            out,
        )
