"""Rotary position embeddings: the cos/sin table of each kind.

The rotation itself happens in `kernels.linear_norm_rope_store`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rope:
    """Default rotary embedding; the other kinds change its frequencies."""

    theta: float  # base of the geometric series of wavelengths
    attention_factor: float = 1.0  # multiplies cos and sin

    @property
    def extended_length(self) -> int:
        """Positions to which it extends a model; 0: it does not."""
        return 0

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """float32 [head_dim / 2], radians per position."""
        return 1.0 / self.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)


@dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN (https://arxiv.org/abs/2309.00071), section 3.2.

    Dimensions that turn often keep their frequency, those that turn seldom are interpolated by
    `factor`, and a ramp joins the two.
    """

    factor: float  # context extension
    original_max_position: float  # positions that the model was pretrained on
    beta_fast: float  # rotations within them: the ramp lies between these
    beta_slow: float
    truncate: bool  # whether the ends of the ramp are rounded to whole dimensions

    @property
    def extended_length(self) -> int:
        return int(self.original_max_position * self.factor)

    def frequencies(self, head_dim: int) -> torch.Tensor:
        # Rounded as in transformers: in a long context the last bit of a frequency can be seen.
        wavelengths = self.theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
        low, high = self._ramp(head_dim)
        ramp = ((torch.arange(head_dim // 2).float() - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept

    def _ramp(self, head_dim: int) -> tuple[float, float]:
        """First and last dimension of the ramp."""

        def dimension(rotations: float) -> float:
            wavelength = self.original_max_position / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return low, high if high != low else high + 0.001


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """The rope of Llama 3.1 to 3.3.

    Dimensions that turn more than `high_freq_factor` times within the pretrained positions keep
    their frequency, those that turn less than `low_freq_factor` times are interpolated by
    `factor`, and those between blend the two.
    """

    factor: float  # context extension; the config's max_position_embeddings has it already
    original_max_position: float
    low_freq_factor: float
    high_freq_factor: float

    def frequencies(self, head_dim: int) -> torch.Tensor:
        # Rounded as in transformers, whose order of operations this is.
        kept = super().frequencies(head_dim)
        turns = self.original_max_position / (2 * math.pi / kept)
        low, high = self.low_freq_factor, self.high_freq_factor
        share = (turns - low) / (high - low)
        blended = (1 - share) * kept / self.factor + share * kept
        return torch.where(
            turns > high, kept, torch.where(turns < low, kept / self.factor, blended)
        )


def cos_sin_table(rope: Rope, head_dim: int, max_position: int) -> torch.Tensor:
    """Returns float32 [max_position, head_dim]: cosines, then sines, of head_dim / 2 angles."""
    angles = torch.arange(max_position).float()[:, None] * rope.frequencies(head_dim)
    return torch.cat([angles.cos(), angles.sin()], dim=1) * rope.attention_factor
