"""The attention interface: what a step tells attention, and what a back end must do with it.

Here are also the plain back end and the choice of one by name. The others are imported only when
chosen: attention_triton.py has our kernels, the default on CUDA, and attention_flash.py takes the
flash-attn package, if it is installed and asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanovllm.kernels import reference

# Keys and values of a layer, each [num_blocks, num_kv_heads, block_size, head_dim]: the tokens of
# one head in one block are contiguous. Block 0 is padding: it belongs to no sequence.
KVCache = tuple[Tensor, Tensor]
# What the kernels on CUDA take.
HEAD_DIMS = (32, 64, 128, 256)


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
    """D sequences with one new token each."""

    block_tables: Tensor  # int32 [D, max_blocks], cache blocks of each sequence, in order
    context_lens: Tensor  # int32 [D], tokens of each sequence, the new one included
    plan: Tensor  # int32 [plan_size(D)], what the back end made of the context lengths
    workspace: Any  # scratch memory of the back end


@dataclass(frozen=True)
class PrefillMetadata:
    """P sequences with any number of new tokens, the last ones of their context."""

    block_tables: Tensor  # int32 [P, max_blocks]
    context_lens: Tensor  # int32 [P], tokens of each sequence, the new ones included
    cu_seqlens_q: Tensor  # int32 [P + 1], first new token of each, from the first prompt token on
    max_seqlen_q: int  # most new tokens of a sequence


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the T tokens of a micro-batch stand: the D that decode first, then those of prompts."""

    slot_mapping: Tensor  # int32 [T], cache slot of each token, block * block_size + offset
    decode: DecodeMetadata | None = None  # of the first D tokens
    prefill: PrefillMetadata | None = None  # of all others


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
        """Plans decode attention on the host: int [D] to int32 [plan_size(D)].

        A context length of 0 is padding; it comes last, and its output may be left undefined.
        """
        return np.empty(0, np.int32)

    def attend(self, q: Tensor, cache: KVCache, metadata: AttentionMetadata) -> Tensor:
        """Attention of all rows of a micro-batch, whose keys and values are in the cache.

        q [T, heads, head_dim] to [T, heads, head_dim].
        """
        out = torch.empty_like(q)
        decode, prefill = metadata.decode, metadata.prefill
        rows = 0 if decode is None else len(decode.context_lens)
        if decode is not None:
            self.decode(q[:rows], cache, decode, out[:rows])
        if prefill is not None:
            self.prefill(q[rows:], cache, prefill, out[rows:])
        return out

    @abstractmethod
    def decode(self, q: Tensor, cache: KVCache, metadata: DecodeMetadata, out: Tensor) -> None:
        """One new token per sequence: writes `out` for q, both [D, heads, head_dim]."""

    @abstractmethod
    def prefill(self, q: Tensor, cache: KVCache, metadata: PrefillMetadata, out: Tensor) -> None:
        """Several new tokens per sequence: writes `out` for q, both [tokens, heads, head_dim]."""


class TorchBackend(AttentionBackend):
    """The slow and obvious reference that the other back ends are tested against."""

    def decode(self, q: Tensor, cache: KVCache, metadata: DecodeMetadata, out: Tensor) -> None:
        starts = torch.arange(len(q) + 1, device=q.device)
        rows = PrefillMetadata(metadata.block_tables, metadata.context_lens, starts, 1)
        self.prefill(q, cache, rows, out)

    def prefill(self, q: Tensor, cache: KVCache, metadata: PrefillMetadata, out: Tensor) -> None:
        m, scale = metadata, self.heads.scale
        out[:] = reference.paged_prefill_attention(
            q, *cache, m.block_tables, m.cu_seqlens_q, m.context_lens, m.max_seqlen_q, scale
        )


def make_backend(
    name: str, heads: HeadShape, device: torch.device, block_size: int, eager: bool = False
) -> AttentionBackend:
    """Builds back end `name`; "auto" is "triton" on CUDA and "torch" elsewhere.

    Raises:
        ValueError: the back end cannot run on this device, with these heads or this block size, or
            unless `eager`, in CUDA graphs.
        ImportError: its package is not installed.
    """
    if device.type != "cuda":
        if name in ("auto", "torch"):
            return TorchBackend(heads)
        raise ValueError(
            f"attention_backend={name!r} is not allowed on device {device}: it needs CUDA; "
            "use 'auto' or 'torch'"
        )
    if heads.head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim={heads.head_dim} is not allowed on CUDA: it must be one of {HEAD_DIMS}"
        )
    if name == "torch":
        if not eager:
            raise ValueError(
                "attention_backend='torch' is not allowed in CUDA graphs, as it asks the GPU how "
                "long contexts are: give enforce_eager=True"
            )
        return TorchBackend(heads)
    if name in ("auto", "triton"):
        from nanovllm.layers.attention_triton import TritonBackend

        return TritonBackend(heads)
    from nanovllm.layers.attention_flash import FlashAttnBackend

    return FlashAttnBackend(heads, block_size)
