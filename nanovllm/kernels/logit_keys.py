"""Logits on the device: as keys, integers in the same order, and as weights.

Their slow forms are ``key_of`` and ``value_of`` in ``reference_sampling``.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def load_logits(source, token, VOCAB: tl.constexpr):
    """Logits in float32; NaN and what is beyond the vocabulary are -inf."""
    value = tl.load(source + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def finite(value):
    return tl.minimum(tl.maximum(value, -MAX), MAX)


@triton.jit
def weight_of(value, peak, scale):
    """``exp((value - peak) / temperature)``: probability, but for a factor; 0 for -inf."""
    return tl.exp2((tl.minimum(value, MAX) - peak) * scale)


@triton.jit
def all_keys(highest, SHIFT: tl.constexpr):
    """The least key of a finite logit, and the key behind the highest of a row."""
    bottom = key_of(tl.minimum(finite(highest), -MAX), SHIFT)
    # NOTE: + 0.0 makes 0 of -0, whose key is another though they are equal.
    return bottom, tl.maximum(key_of(highest + 0.0, SHIFT) + 1, bottom)


@triton.jit
def key_of(value, SHIFT: tl.constexpr):
    """An int64 that orders floats as they are ordered, rounded down by SHIFT bits."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The float32 that has this key, and ends with SHIFT zeros."""
    KEPT: tl.constexpr = (0x7FFFFFFF >> SHIFT) << SHIFT
    bits = key << SHIFT
    bits = tl.where(key < 0, bits ^ KEPT, bits)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)
