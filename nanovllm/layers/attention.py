"""The attention interface: what a step tells attention, and what a back end must do with it.

    attention_torch.py      the readable reference, on any device
    attention_triton.py     our kernels, the default on CUDA
    attention_flash.py      the flash-attn package, if it is installed and asked for
    attention_backends.py   picks one of them by name

The KV cache of a layer is a pair of [num_blocks, num_kv_heads, block_size, head_dim]: the tokens
of one head in one block are contiguous. Block 0 is padding: it belongs to no sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadShape:
    """Attention heads of one rank."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def scale(self) -> float:
        """Factor of the scores, 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5


@dataclass(frozen=True)
class DecodeMetadata:
    """D sequences with one new token each.

    Attributes:
        block_tables: int32 [D, max_blocks], cache blocks of each sequence, in order.
        context_lens: int32 [D], tokens of each sequence, the new one included.
        plan: int32 [plan_size(D)], what the back end's `plan` made of the context lengths.
        workspace: scratch memory of the back end (`make_workspace`).
    """

    block_tables: Tensor
    context_lens: Tensor
    plan: Tensor
    workspace: Any


@dataclass(frozen=True)
class PrefillMetadata:
    """P sequences with any number of new tokens, the last ones of their context.

    Attributes:
        block_tables: int32 [P, max_blocks], cache blocks of each sequence, in order.
        context_lens: int32 [P], tokens of each sequence, the new ones included.
        cu_seqlens_q: int32 [P + 1], first new token of each sequence, counted from the first
            prompt token of the micro-batch.
        max_seqlen_q: most new tokens of a sequence.
    """

    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the T tokens of a micro-batch stand: the D that decode first, then those of prompts.

    Attributes:
        slot_mapping: int32 [T], cache slot of each token, block * block_size + offset.
        decode: of the first D tokens; None: there are none.
        prefill: of all others; None: there are none.
    """

    slot_mapping: Tensor
    decode: DecodeMetadata | None = None
    prefill: PrefillMetadata | None = None


class AttentionBackend(ABC):
    """Causal attention over a paged KV cache, for the heads of one rank."""

    def __init__(self, heads: HeadShape) -> None:
        self.heads = heads

    def make_workspace(self, device: torch.device, num_sms: int) -> Any:
        """Scratch memory for decode on `num_sms` SMs; one per stream that decodes."""
        return None

    def plan_size(self, num_seqs: int) -> int:
        """Integers of a plan for that many sequences."""
        return 0

    def plan(self, context_lens: np.ndarray) -> np.ndarray:
        """Plans decode attention on the host.

        Args:
            context_lens: int [D], tokens of each sequence; 0 for padding, which comes last and
                whose output may be left undefined.

        Returns:
            int32 [plan_size(D)], for `DecodeMetadata.plan` on the device.
        """
        return np.empty(0, np.int32)

    def attend(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Attention of all rows of a micro-batch, whose keys and values are in the cache.

        Args:
            q: [T, heads, head_dim].
            k_cache, v_cache: of the layer.
            metadata: of the T tokens.

        Returns:
            [T, heads, head_dim].
        """
        out = torch.empty_like(q)
        decode, prefill = metadata.decode, metadata.prefill
        rows = 0 if decode is None else len(decode.context_lens)
        if decode is not None:
            self.decode(q[:rows], k_cache, v_cache, decode, out[:rows])
        if prefill is not None:
            self.prefill(q[rows:], k_cache, v_cache, prefill, out[rows:])
        return out

    @abstractmethod
    def decode(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: DecodeMetadata, out: Tensor
    ) -> None:
        """One new token per sequence: writes `out` for q, both [D, heads, head_dim]."""

    @abstractmethod
    def prefill(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: PrefillMetadata, out: Tensor
    ) -> None:
        """Several new tokens per sequence: writes `out` for q, both [tokens, heads, head_dim]."""
