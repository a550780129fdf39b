"""What config.json says of rotary embeddings, in the spellings of transformers 4.x and 5.x."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from nanovllm.layers.rotary_embedding import Llama3Rope, Rope, YarnRope
from nanovllm.models.rules import (
    BOOLEAN,
    NULL,
    POSITIVE,
    REQUIRED,
    ZERO,
    Fields,
    UnsupportedModelError,
    check_fields,
    one_of,
)

LENGTH, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"

COMMON_FIELDS: Fields = {
    "rope_theta": (POSITIVE, 10_000.0),
    "partial_rotary_factor": (one_of(1, 1.0), 1.0),
}

YARN_FIELDS: Fields = {
    "factor": (POSITIVE | NULL, REQUIRED),
    ORIGINAL: (POSITIVE, REQUIRED),
    "attention_factor": (POSITIVE | NULL, None),
    "beta_fast": (POSITIVE | ZERO | NULL, None),
    "beta_slow": (POSITIVE | ZERO | NULL, None),
    "mscale": (POSITIVE | ZERO | NULL, None),
    "mscale_all_dim": (POSITIVE | ZERO | NULL, None),
    "truncate": (BOOLEAN, True),
}

LLAMA3_FIELDS: Fields = {
    "factor": (POSITIVE, REQUIRED),
    ORIGINAL: (POSITIVE, REQUIRED),
    "low_freq_factor": (POSITIVE, REQUIRED),
    "high_freq_factor": (POSITIVE, REQUIRED),
}


def parse_rope(
    fields: Mapping[str, Any], values: Mapping[str, Any], types: Collection[str]
) -> Rope:
    """The rope of a model of these `fields` of config.json, whose checked ones have these `values`.

    `rope_theta` and `rope_scaling` (4.x) mean the same as `rope_parameters` (5.x); of both, the
    former wins. `types` are the values of `rope_type` that the architecture may have.
    """
    given = values["rope_scaling"] or values["rope_parameters"] or {}
    # An older name, which counts only where the newer one is absent.
    rope = {"rope_type": given["type"]} if "type" in given else {}
    if "rope_theta" in fields:
        rope["rope_theta"] = fields["rope_theta"]
    rope.update(given)
    rope.setdefault(ORIGINAL, values[LENGTH])
    if ORIGINAL in fields:
        rope[ORIGINAL] = fields[ORIGINAL]
    kind = check_fields(rope, {"rope_type": (one_of(*types), "default")})["rope_type"]
    own_fields, make = ROPES[kind]
    checked = check_fields(rope, COMMON_FIELDS | own_fields)
    return make(checked | {LENGTH: values[LENGTH]})


def _yarn(values: Mapping[str, Any]) -> YarnRope:
    if values["rope_theta"] == 1:
        raise UnsupportedModelError("config.json: rope_theta=1 is not supported with YaRN")
    factor = values["factor"] or values[LENGTH] / values[ORIGINAL]
    return YarnRope(
        theta=values["rope_theta"],
        attention_factor=values["attention_factor"] or _yarn_attention_factor(values, factor),
        factor=factor,
        original_max_position=values[ORIGINAL],
        beta_fast=values["beta_fast"] or 32.0,
        beta_slow=values["beta_slow"] or 1.0,
        truncate=values["truncate"],
    )


def _yarn_attention_factor(values: Mapping[str, Any], factor: float) -> float:
    """YaRN (https://arxiv.org/abs/2309.00071), equation 22."""

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = values["mscale"], values["mscale_all_dim"]
    if mscale and mscale_all:
        return magnitude(mscale) / magnitude(mscale_all)
    return magnitude(1.0)


def _llama3(values: Mapping[str, Any]) -> Llama3Rope:
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    if high <= low:
        raise UnsupportedModelError(
            f"config.json: high_freq_factor={high:g} is not supported: it must be above "
            f"low_freq_factor={low:g}"
        )
    return Llama3Rope(
        theta=values["rope_theta"],
        factor=values["factor"],
        original_max_position=values[ORIGINAL],
        low_freq_factor=low,
        high_freq_factor=high,
    )


# By rope_type: the fields of its own, and what makes the rope of all values.
ROPES: dict[str, tuple[Fields, Callable[[Mapping[str, Any]], Rope]]] = {
    "default": ({}, lambda values: Rope(values["rope_theta"])),
    "yarn": (YARN_FIELDS, _yarn),
    "llama3": (LLAMA3_FIELDS, _llama3),
}
