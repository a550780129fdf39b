"""Picks an attention back end; each is imported only when chosen, for what its package needs."""

from __future__ import annotations

import torch

from nanovllm.layers.attention import AttentionBackend, HeadShape


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
    if name == "triton":
        from nanovllm.layers.attention_triton import TritonBackend

        return TritonBackend(heads)
    if name == "flash_attn":
        from nanovllm.layers.attention_flash import FlashAttnBackend

        return FlashAttnBackend(heads, block_size)
    from nanovllm.layers.attention_torch import TorchBackend

    return TorchBackend(heads)
