"""config.json of a checkpoint, parsed and checked into one frozen record.

It is read directly rather than through transformers, so that every version's spelling (4.51
to 5.x) is understood by any installed one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.layers.attention import HeadShape
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.rotary_embedding import Rope
from nanovllm.models.architectures import find_architecture
from nanovllm.models.rope import parse_rope
from nanovllm.models.rules import (
    EVEN_SIZE,
    TOKEN_IDS,
    UnsupportedModelError,
    check_field,
    check_fields,
)
from nanovllm.utils.json_files import is_there, read_object

MAX_WEIGHTS = 2**46
# The fields that make up the number of weights.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@dataclass(frozen=True)
class ModelConfig:
    """What a model is; names as in config.json, or as in the table of architectures."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    dtype: str | None
    eos_token_ids: tuple[int, ...]

    @property
    def usable_length(self) -> int:
        """Positions that the model was made for, or to which its rope extends them."""
        return max(self.max_position_embeddings, self.rope.extended_length)

    @property
    def num_weights(self) -> int:
        """Weights of all matrices; norms and biases, about a thousandth of them, do not count."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        embeddings = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + embeddings * self.vocab_size * self.hidden_size

    def sizes(self) -> str:
        """The fields that make up `num_weights`, for errors."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in SIZES)

    def rank_heads(self, group: ParallelGroup) -> HeadShape:
        """Attention heads of one rank.

        Raises:
            UnsupportedModelError: the model cannot be split evenly over the ranks.
        """
        ranks, kv_heads = group.size, self.num_key_value_heads
        for name in ("num_attention_heads", "intermediate_size"):
            if getattr(self, name) % ranks:
                raise UnsupportedModelError(
                    f"tensor_parallel_size={ranks} does not divide {name}={getattr(self, name)}"
                )
        if kv_heads % ranks and ranks % kv_heads:
            raise UnsupportedModelError(
                f"tensor_parallel_size={ranks} neither divides nor is a multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        return HeadShape(
            self.num_attention_heads // ranks, max(kv_heads // ranks, 1), self.head_dim
        )


def load_config(directory: Path) -> ModelConfig:
    """Reads `config.json` and, for more end-of-sequence ids, `generation_config.json`.

    Raises:
        FileNotFoundError: there is no config.json.
        UnsupportedModelError: a file cannot be read, or the model is not supported.
    """
    path = directory / "config.json"
    if not is_there(path):
        raise FileNotFoundError(f"{directory} holds no config.json: not a model directory")
    fields = read_object(path, UnsupportedModelError)
    generation = directory / "generation_config.json"
    also = read_object(generation, UnsupportedModelError) if is_there(generation) else {}
    return parse_config(fields, also.get("eos_token_id"))


def parse_config(fields: Mapping[str, Any], generation_eos: Any = None) -> ModelConfig:
    """Checks the parsed config.json; `generation_eos` as in generation_config.json.

    Raises:
        UnsupportedModelError: a field has a value that is not supported.
    """
    architecture = find_architecture(fields)
    values = check_fields(fields, architecture.fields)
    heads = values["num_attention_heads"]
    kv_heads = values["num_key_value_heads"] or heads
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"config.json: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    _check_layers(values)
    bias = values.get("attention_bias", False)
    values |= {
        "architecture": architecture.name,
        "num_key_value_heads": kv_heads,
        "head_dim": values["head_dim"] or _derived_head_dim(values),
        "rope": parse_rope(fields, values, architecture.ropes),
        "qk_norm": architecture.qk_norm,
        "qkv_bias": bias if architecture.qkv_bias is None else architecture.qkv_bias,
        "o_bias": bias if architecture.o_bias is None else architecture.o_bias,
        "dtype": values["dtype"] or values["torch_dtype"],
        "eos_token_ids": _eos_token_ids(fields, values, generation_eos),
    }
    config = ModelConfig(
        **{each.name: values[each.name] for each in dataclasses.fields(ModelConfig)}
    )
    if config.num_weights > MAX_WEIGHTS:
        raise UnsupportedModelError(
            f"config.json: {config.sizes()} make {config.num_weights} weights, "
            f"more than {MAX_WEIGHTS}"
        )
    return config


def _derived_head_dim(values: Mapping[str, Any]) -> int:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    name = f"head_dim (hidden_size={hidden} // num_attention_heads={heads})"
    return check_field(name, hidden // heads, EVEN_SIZE)


def _check_layers(values: Mapping[str, Any]) -> None:
    """Every layer must attend to all positions; one that does not has a sliding window."""
    layers, types = values["num_hidden_layers"], values["layer_types"]
    if types is not None and len(types) != layers:
        raise UnsupportedModelError(
            f"config.json: layer_types has {len(types)} entries for num_hidden_layers={layers}"
        )
    window = values["sliding_window"] if values["use_sliding_window"] else None
    if types is None and window is not None and values["max_window_layers"] < layers:
        raise UnsupportedModelError(
            "config.json: use_sliding_window=True is not supported: it must be False, or "
            f"max_window_layers={values['max_window_layers']} at least num_hidden_layers={layers}"
        )


def _eos_token_ids(
    fields: Mapping[str, Any], values: Mapping[str, Any], generation_eos: Any
) -> tuple[int, ...]:
    """Those of both files; the default of the architecture counts only where neither has any."""
    also = check_field("eos_token_id", generation_eos, TOKEN_IDS, "generation_config.json")
    known = "eos_token_id" in fields or not also
    return tuple(dict.fromkeys([*(values["eos_token_id"] if known else []), *also]))
