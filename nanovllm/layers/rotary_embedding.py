"""The cos/sin table of rotary position embeddings, default and YaRN-scaled.

The rotation itself happens in `kernels.linear_norm_rope_store` and `kernels.qk_norm_rope`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base wavelength and, if `factor` is set, YaRN scaling.

    Attributes:
        theta: base of the geometric series of wavelengths.
        factor: YaRN context extension; None: default rope.
        original_max_position: positions the model was pretrained on (YaRN).
        attention_factor: multiplies cos and sin (YaRN); 1 without.
        beta_fast, beta_slow: rotations between which YaRN blends (its default: 32 and 1).
        truncate: whether YaRN rounds the ends of the blend to whole dimensions.
    """

    theta: float
    factor: float | None = None
    original_max_position: float = 0.0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


def cos_sin_table(rope: RopeConfig, head_dim: int, max_position: int) -> torch.Tensor:
    """Returns float32 [max_position, head_dim]: cosines, then sines, of head_dim / 2 angles."""
    angles = torch.arange(max_position).float()[:, None] * _inverse_wavelengths(rope, head_dim)
    return torch.cat([angles.cos(), angles.sin()], dim=1) * rope.attention_factor


def _inverse_wavelengths(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """float32 [head_dim / 2], radians per position."""
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if rope.factor is None:
        return 1.0 / wavelengths
    # YaRN (https://arxiv.org/abs/2309.00071), section 3.2: dimensions that turn often keep their
    # wavelength, those that turn seldom are interpolated by `factor`, and a ramp joins the two.
    # Rounded as in transformers: in a long context the last bit of a wavelength can be seen.
    low, high = _blend_range(rope, head_dim)
    ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _blend_range(rope: RopeConfig, head_dim: int) -> tuple[float, float]:
    """First and last dimension of YaRN's ramp."""

    def dimension(rotations: float) -> float:
        wavelength = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high if high != low else high + 0.001
