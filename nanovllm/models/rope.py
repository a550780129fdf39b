"""What config.json says of rotary embeddings, in the spellings of transformers 4.x and 5.x."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from nanovllm.layers.rotary_embedding import Rope
from nanovllm.models.rules import (
    ABSENT,
    POSITIVE,
    REQUIRED,
    Fields,
    UnsupportedModelError,
    check_fields,
)
from nanovllm.utils.options import BOOLEAN, NONE, choice

ORIGINAL = "original_max_position_embeddings"

COMMON_FIELDS: Fields = {
    "rope_theta": (POSITIVE, 10_000.0),
    "partial_rotary_factor": (choice(1, 1.0), 1.0),
}

# By rope_type: the fields of its own.
ROPES: dict[str, Fields] = {
    "default": {},
    "yarn": {
        "factor": (POSITIVE | NONE, REQUIRED),
        ORIGINAL: (POSITIVE, REQUIRED),
        "attention_factor": (POSITIVE | NONE, None),
        "beta_fast": (POSITIVE | ABSENT, None),
        "beta_slow": (POSITIVE | ABSENT, None),
        "mscale": (POSITIVE | ABSENT, None),
        "mscale_all_dim": (POSITIVE | ABSENT, None),
        "truncate": (BOOLEAN, True),
    },
    "llama3": {
        "factor": (POSITIVE, REQUIRED),
        ORIGINAL: (POSITIVE, REQUIRED),
        "low_freq_factor": (POSITIVE, REQUIRED),
        "high_freq_factor": (POSITIVE, REQUIRED),
    },
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
    rope.setdefault(ORIGINAL, values["max_position_embeddings"])
    if ORIGINAL in fields:
        rope[ORIGINAL] = fields[ORIGINAL]
    checked = check_fields(rope, {"rope_type": (choice(*types), "default")})
    checked |= check_fields(rope, COMMON_FIELDS | ROPES[checked["rope_type"]])
    if checked["rope_type"] == "yarn" and checked["rope_theta"] == 1:
        raise UnsupportedModelError("config.json: rope_theta=1 is not supported with YaRN")
    low, high = checked.get("low_freq_factor", 0), checked.get("high_freq_factor", 1)
    if high <= low:
        raise UnsupportedModelError(
            f"config.json: high_freq_factor={high:g} is not supported: it must be above "
            f"low_freq_factor={low:g}"
        )
    return Rope(checked, values["max_position_embeddings"])
