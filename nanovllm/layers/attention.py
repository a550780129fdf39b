"""The attention interface: what a step tells attention, and what a back end must do with it.

    attention_torch.py    the readable reference, on any device
    attention_triton.py   our kernels, the default on CUDA
    attention_flash.py    the flash-attn package, if it is installed and asked for

The KV cache of a layer is a pair of [num_blocks, num_kv_heads, block_size, head_dim]: the tokens
of one head in one block are contiguous. Block 0 is padding: it belongs to no sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch


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
class AttentionMetadata:
    """Where the tokens of one step stand: T new tokens of N sequences; all integers are int32.

    Attributes:
        slot_mapping: [T] cache slot of each new token, block * block_size + offset.
        block_tables: [N, max_blocks] cache blocks of each sequence, in order.
        context_lens: [N] tokens of each sequence that are cached once this step has stored its own.
    """

    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    context_lens: torch.Tensor


@dataclass(frozen=True)
class DecodeMetadata(AttentionMetadata):
    """A step in which each sequence has one new token, T = N.

    Attributes:
        tile_offsets: [N + 1] running count of KV tiles, ceil(context / tile_size) a sequence.
        workspace: scratch memory of the back end (`make_workspace`).
    """

    tile_offsets: torch.Tensor
    workspace: Any

    def split(self, cut_at: int) -> tuple[DecodeMetadata, DecodeMetadata]:
        """Cuts the step after its first `cut_at` sequences."""
        offsets = self.tile_offsets
        first = DecodeMetadata(
            self.slot_mapping[:cut_at],
            self.block_tables[:cut_at],
            self.context_lens[:cut_at],
            offsets[: cut_at + 1],
            self.workspace,
        )
        second = DecodeMetadata(
            self.slot_mapping[cut_at:],
            self.block_tables[cut_at:],
            self.context_lens[cut_at:],
            offsets[cut_at:] - offsets[cut_at],
            self.workspace,
        )
        return first, second


@dataclass(frozen=True)
class PrefillMetadata(AttentionMetadata):
    """A step in which sequences have any number of new tokens, the last ones of their context.

    Attributes:
        cu_seqlens_q: [N + 1] first new token of each sequence.
        max_seqlen_q: most new tokens of a sequence.
    """

    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int


Metadata = DecodeMetadata | PrefillMetadata


class AttentionBackend(ABC):
    """Causal attention over a paged KV cache, for the heads of one rank.

    `tile_size` is the number of tokens that `DecodeMetadata.tile_offsets` counts as one tile.
    """

    tile_size = 64

    def __init__(self, heads: HeadShape) -> None:
        self.heads = heads

    def make_workspace(self, device: torch.device, num_sms: int) -> Any:
        """Scratch memory for decode on `num_sms` SMs; one per stream that decodes."""
        return None

    def prefill_lengths(self, dtype: torch.dtype) -> list[int]:
        """Lengths of sequences in prefill for each of which other kernels run."""
        return [1]

    @abstractmethod
    def decode(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: DecodeMetadata,
    ) -> torch.Tensor:
        """One new token per sequence: q [N, heads, head_dim] to an output of the same shape."""

    @abstractmethod
    def prefill(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        metadata: PrefillMetadata,
    ) -> torch.Tensor:
        """Several new tokens per sequence: q [T, heads, head_dim] to an output of that shape."""


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
    if name != "torch" and device.type != "cuda":
        raise ValueError(
            f"attention_backend={name!r} is not allowed on device {device}: it needs CUDA; "
            "use 'auto' or 'torch'"
        )
    # Imported only when chosen: each needs packages that the others do without.
    if name == "triton":
        from nanovllm.layers.attention_triton import TritonBackend

        return TritonBackend(heads)
    if name == "flash_attn":
        from nanovllm.layers.attention_flash import FlashAttnBackend

        return FlashAttnBackend(heads, block_size)
    from nanovllm.layers.attention_torch import TorchBackend

    return TorchBackend(heads)
