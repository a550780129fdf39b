"""How a model's attention heads are split over the ranks."""

from __future__ import annotations

from nanovllm.layers.attention import HeadShape
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models.qwen3_config import Qwen3Config, UnsupportedModelError


def rank_heads(config: Qwen3Config, group: ParallelGroup) -> HeadShape:
    """Attention heads of one rank.

    Raises:
        UnsupportedModelError: the model cannot be split evenly over the ranks.
    """
    size, kv_heads = group.size, config.num_key_value_heads
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise UnsupportedModelError(
                f"tensor_parallel_size={size} does not divide {name}={getattr(config, name)}"
            )
    if kv_heads % size and size % kv_heads:
        raise UnsupportedModelError(
            f"tensor_parallel_size={size} neither divides nor is a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    return HeadShape(config.num_attention_heads // size, max(kv_heads // size, 1), config.head_dim)
