"""Rotary position embeddings: the cos/sin table of each kind.

The rotation itself happens in `kernels.linear_norm_rope_store`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rope:
    """A kind of rotary embedding.

    Attributes:
        parameters: `rope_parameters` of config.json, as transformers 5 names and understands them.
        max_position: `max_position_embeddings` there.
    """

    parameters: Mapping[str, Any]
    max_position: int

    @property
    def extended_length(self) -> int:
        """Positions to which it extends a model; 0: it does not."""
        if self.parameters["rope_type"] != "yarn" or self.parameters["factor"] is None:
            return 0
        # Llama 3 has its factor in `max_position` already.
        return int(self.parameters["original_max_position_embeddings"] * self.parameters["factor"])

    def frequencies(self, head_dim: int) -> tuple[torch.Tensor, float]:
        """float32 [head_dim / 2], radians per position; and what multiplies cos and sin."""
        kind, theta = self.parameters["rope_type"], self.parameters["rope_theta"]
        if kind == "default":
            exponents = torch.arange(0, head_dim, 2, device="cpu").float() / head_dim
            return 1.0 / theta**exponents, 1.0
        # Imported late: it takes seconds, and other models do without it.
        from transformers import PreTrainedConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = PreTrainedConfig()
        config.update({
            "hidden_size": head_dim,
            "num_attention_heads": 1,
            "head_dim": head_dim,
            "max_position_embeddings": self.max_position,
            "rope_parameters": dict(self.parameters),
        })  # fmt: skip
        return ROPE_INIT_FUNCTIONS[kind](config, "cpu")


def cos_sin_table(rope: Rope, head_dim: int, max_position: int) -> torch.Tensor:
    """Returns float32 [max_position, head_dim]: cosines, then sines, of head_dim / 2 angles."""
    frequencies, factor = rope.frequencies(head_dim)
    angles = torch.arange(max_position, device="cpu").float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1) * factor
