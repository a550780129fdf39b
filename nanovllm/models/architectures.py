"""The table of architectures: what tells one decoder from another is data, and all of it is here.

A new model whose layers are made like these (see decoder.py) needs one entry. Nothing else knows a
model by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.models.rules import (
    DTYPE,
    EVEN_SIZE,
    FLAT_OBJECT,
    FRACTION,
    INTEGER,
    LAYER_TYPES,
    MAX_LAYERS,
    SIZE,
    TOKEN_IDS,
    Fields,
    UnsupportedModelError,
)
from nanovllm.utils.options import BOOLEAN, NONE, choice, integer, short

# What all have in common; absent fields have the defaults of Qwen's classes in transformers.
COMMON_FIELDS: Fields = {
    "vocab_size": (SIZE, 151_936),
    "hidden_size": (SIZE, 4096),
    "intermediate_size": (SIZE, 22_016),
    "num_hidden_layers": (integer(1, MAX_LAYERS), 32),
    "num_attention_heads": (SIZE, 32),
    "num_key_value_heads": (SIZE | NONE, 32),
    "head_dim": (EVEN_SIZE | NONE, None),
    "max_position_embeddings": (SIZE, 32_768),
    "rms_norm_eps": (FRACTION, 1e-6),
    "tie_word_embeddings": (BOOLEAN, False),
    "hidden_act": (choice("silu", "swish"), "silu"),
    "use_sliding_window": (BOOLEAN, False),
    "sliding_window": (INTEGER | NONE, 4096),
    "max_window_layers": (INTEGER, 28),
    "layer_types": (LAYER_TYPES | NONE, None),
    "dtype": (DTYPE | NONE, None),
    "torch_dtype": (DTYPE | NONE, None),
    "eos_token_id": (TOKEN_IDS, None),
    "rope_parameters": (FLAT_OBJECT | NONE, None),
    "rope_scaling": (FLAT_OBJECT | NONE, None),
    "partial_rotary_factor": (choice(1, 1.0) | NONE, None),
    # With these it would be another model, or other files.
    "quantization_config": (NONE, None),
    "per_layer_config": (NONE, None),
    "is_causal": (choice(True), True),
    "attention_chunk_size": (NONE, None),
    "kv_sharing_modes": (NONE, None),
    "attribute_map": (NONE, None),
    "configuration_files": (NONE, None),
    "transformers_weights": (NONE, None),
}


@dataclass(frozen=True)
class Architecture:
    """An entry of the table."""

    name: str  # in `architectures` of config.json
    model_type: str  # there
    ropes: tuple[str, ...]  # values of `rope_type` that it may have, see rope.py
    qk_norm: bool = False  # RMS norm of every query and key head
    # Biases of the QKV and the output projection; None: as the field `attention_bias` says.
    qkv_bias: bool | None = None
    o_bias: bool | None = None
    # Fields of config.json that others have not, or with another rule or default.
    own_fields: Fields = field(default_factory=dict)

    @property
    def fields(self) -> Fields:
        """All fields of config.json that matter."""
        return COMMON_FIELDS | self.own_fields

    @property
    def base_name(self) -> str:
        """In `architectures` of a base model that was saved alone, without an output head."""
        return self.name.replace("ForCausalLM", "Model")

    def is_among(self, names: Any) -> bool:
        """Whether `architectures` of config.json has it, or says nothing."""
        if not names:
            return names is None or names == []
        return isinstance(names, list) and (self.name in names or self.base_name in names)


QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    model_type="qwen3",
    ropes=("default", "yarn"),
    qk_norm=True,
    own_fields={"attention_bias": (BOOLEAN, False), "head_dim": (EVEN_SIZE, 128)},
)

# Qwen2 and Qwen2.5.
QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    model_type="qwen2",
    ropes=("default", "yarn"),
    qkv_bias=True,
    o_bias=False,
)

# Llama 3 to 3.3.
LLAMA = Architecture(
    name="LlamaForCausalLM",
    model_type="llama",
    ropes=("default", "llama3", "yarn"),
    qkv_bias=False,
    o_bias=False,
    own_fields={
        "attention_bias": (choice(False), False),
        "mlp_bias": (choice(False), False),
        "pretraining_tp": (choice(1) | NONE, 1),
        "sliding_window": (NONE, None),
        "vocab_size": (SIZE, 32_000),
        "intermediate_size": (SIZE, 11_008),
        "num_key_value_heads": (SIZE | NONE, None),
        "max_position_embeddings": (SIZE, 2048),
        "eos_token_id": (TOKEN_IDS, 2),
    },
)

ARCHITECTURES = (QWEN3, QWEN2, LLAMA)


def find_architecture(fields: Mapping[str, Any]) -> Architecture:
    """The entry that `model_type` names, which is what decides in transformers, too.

    Raises:
        UnsupportedModelError: there is none, or `architectures` names another model.
    """
    model_type, names = fields.get("model_type"), fields.get("architectures")
    for entry in ARCHITECTURES:
        if model_type == entry.model_type and entry.is_among(names):
            return entry
    known = ", ".join(f"{entry.name} (model_type={entry.model_type!r})" for entry in ARCHITECTURES)
    raise UnsupportedModelError(
        f"config.json: architecture {short(names)} (model_type={short(model_type)}) is not "
        f"supported: it must be one of {known}"
    )
