"""config.json of a Qwen3 checkpoint, parsed and checked into one frozen record.

It is read directly rather than through transformers, so that every version's spelling (4.51
to 5.x) is understood by any installed one. What is accepted means what it means to transformers;
anything else is refused by name.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.layers.rotary_embedding import RopeConfig
from nanovllm.utils.json_files import is_there, read_object
from nanovllm.utils.options import is_int

ARCHITECTURE = "Qwen3ForCausalLM"
# A base model saved alone is one without its output head.
BASE_ARCHITECTURE = "Qwen3Model"
DTYPES = {
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
QUOTES = "'\""
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1000
MAX_WEIGHTS = 2**46

# A rule takes a field's value and returns it, perhaps normalised, or raises ValueError with the
# words for what is allowed.
Rule = Callable[[Any], Any]


class UnsupportedModelError(ValueError):
    """The checkpoint asks for something that this engine does not do, or its config is damaged."""


def size(limit: int = MAX_SIZE) -> Rule:
    """Positive integers."""

    def rule(value: Any) -> int:
        if is_int(value) and 0 < value <= limit:
            return value
        raise ValueError(f"a positive integer of at most {limit}")

    return rule


def integer(value: Any) -> int:
    """Integers."""
    if is_int(value):
        return value
    raise ValueError("an integer")


def even_size(value: Any) -> int:
    """Positive even integers, as rotary embeddings need them."""
    if is_int(value) and 0 < value <= MAX_SIZE and value % 2 == 0:
        return value
    raise ValueError("a positive integer and even, as rope needs it")


def boolean(value: Any) -> bool:
    """True or False, nothing that merely counts as one."""
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


def positive(value: Any) -> float:
    """Positive numbers, within what float32 arithmetic can take."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1e-30 <= value <= 1e30:
        return float(value)
    raise ValueError("a positive number, from 1e-30 to 1e30")


def fraction(value: Any) -> float:
    """Floats (no integers) above 0, up to 1."""
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise ValueError("a positive float of at most 1")


def one_of(*allowed: Any) -> Rule:
    """The given values, of their own type."""

    def rule(value: Any) -> Any:
        for item in allowed:
            if type(value) is type(item) and value == item:
                return value
        raise ValueError(" or ".join(map(repr, allowed)))

    return rule


def or_null(inner: Rule) -> Rule:
    """What `inner` allows, and null."""

    def rule(value: Any) -> Any:
        try:
            return None if value is None else inner(value)
        except ValueError as allowed:
            raise ValueError(f"{allowed}, or null") from None

    return rule


def or_zero(inner: Rule) -> Rule:
    """What `inner` allows; zero and null alike stand for none."""

    def rule(value: Any) -> Any:
        is_number = is_int(value) or isinstance(value, float)
        return None if value is None or (is_number and value == 0) else inner(value)

    return rule


def list_of(inner: Rule) -> Rule:
    """Lists of what `inner` allows."""

    def rule(value: Any) -> list[Any]:
        try:
            if isinstance(value, list):
                return [inner(item) for item in value]
        except ValueError as allowed:
            raise ValueError(f"a list, each item {allowed}") from None
        raise ValueError("a list")

    return rule


def text(value: Any) -> str:
    """Strings."""
    if isinstance(value, str):
        return value
    raise ValueError("a string")


def token_ids(value: Any) -> list[int]:
    """A token id, a list of them, or null for none."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if all(is_int(token) for token in ids):
        return ids
    raise ValueError("an integer, a list of integers or null")


def dtype_name(value: Any) -> str:
    """torch's names of the dtypes that the engine computes in."""
    if isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    raise ValueError("one of " + ", ".join(DTYPES))


def flat_object(value: Any) -> dict[str, Any]:
    """Objects that hold no objects."""
    if isinstance(value, dict) and not any(isinstance(item, dict) for item in value.values()):
        return value
    raise ValueError("a flat object")


def null(value: Any) -> None:
    """Null alone."""
    if value is not None:
        raise ValueError("null or absent")


REQUIRED: Any = object()

# Each field with its rule and with the value that an absent one has, the default of transformers.
FIELDS: dict[str, tuple[Rule, Any]] = {
    "vocab_size": (size(), 151_936),
    "hidden_size": (size(), 4096),
    "intermediate_size": (size(), 22_016),
    "num_hidden_layers": (size(MAX_LAYERS), 32),
    "num_attention_heads": (size(), 32),
    "num_key_value_heads": (or_null(size()), 32),
    "head_dim": (even_size, 128),
    "max_position_embeddings": (size(), 32_768),
    "rms_norm_eps": (fraction, 1e-6),
    "tie_word_embeddings": (boolean, False),
    "attention_bias": (boolean, False),
    "hidden_act": (one_of("silu", "swish"), "silu"),
    "use_sliding_window": (boolean, False),
    "sliding_window": (or_null(integer), 4096),
    "max_window_layers": (integer, 28),
    "layer_types": (or_null(list_of(one_of("full_attention", "attention"))), None),
    "dtype": (or_null(dtype_name), None),
    "torch_dtype": (or_null(dtype_name), None),
    "eos_token_id": (token_ids, None),
    "rope_parameters": (or_null(flat_object), None),
    "rope_scaling": (or_null(flat_object), None),
    "partial_rotary_factor": (or_null(one_of(1, 1.0)), None),
    # With these it would be another model, or other files.
    "quantization_config": (null, None),
    "per_layer_config": (null, None),
    "configuration_files": (null, None),
    "transformers_weights": (null, None),
}

ROPE_FIELDS: dict[str, tuple[Rule, Any]] = {
    "rope_theta": (positive, 10_000.0),
    "rope_type": (one_of("default", "yarn"), "default"),
    "partial_rotary_factor": (one_of(1, 1.0), 1.0),
}

YARN_FIELDS: dict[str, tuple[Rule, Any]] = {
    "factor": (or_null(positive), REQUIRED),
    "original_max_position_embeddings": (positive, REQUIRED),
    "attention_factor": (or_null(positive), None),
    "beta_fast": (or_zero(positive), None),
    "beta_slow": (or_zero(positive), None),
    "mscale": (or_zero(positive), None),
    "mscale_all_dim": (or_zero(positive), None),
    "truncate": (boolean, True),
}


@dataclass(frozen=True)
class Qwen3Config:
    """Shape of a Qwen3 model; names as in config.json, where `dtype` may be absent."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    dtype: str | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, directory: Path) -> Qwen3Config:
        """Reads `config.json` and, for more end-of-sequence ids, `generation_config.json`.

        Raises:
            FileNotFoundError: there is no config.json.
            UnsupportedModelError: it is no Qwen3 dense model, or one with unknown features, or a
                file cannot be read.
        """
        path = directory / "config.json"
        if not is_there(path):
            raise FileNotFoundError(f"{directory} holds no config.json: not a model directory")
        fields = read_object(path, UnsupportedModelError)
        generation = directory / "generation_config.json"
        also = {}
        if is_there(generation):
            also = read_object(generation, UnsupportedModelError)
        return cls.from_dict(fields, also.get("eos_token_id"))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], generation_eos: Any = None) -> Qwen3Config:
        """Checks the parsed config.json; `generation_eos` as in generation_config.json.

        Raises:
            UnsupportedModelError: a field has a value that is not supported.
        """
        _check_architecture(fields)
        values = _checked(fields, FIELDS)
        heads = values["num_attention_heads"]
        kv_heads = values["num_key_value_heads"] or heads
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        _check_layers(values)
        also = _check("eos_token_id", generation_eos, token_ids, "generation_config.json")
        config = cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=values["head_dim"],
            max_position_embeddings=values["max_position_embeddings"],
            rms_norm_eps=values["rms_norm_eps"],
            rope=_parse_rope(fields, values),
            tie_word_embeddings=values["tie_word_embeddings"],
            attention_bias=values["attention_bias"],
            dtype=values["dtype"] or values["torch_dtype"],
            eos_token_ids=tuple(dict.fromkeys((*values["eos_token_id"], *also))),
        )
        if config.num_weights > MAX_WEIGHTS:
            raise UnsupportedModelError(
                f"config.json: {config.sizes()} make {config.num_weights} weights, "
                f"more than {MAX_WEIGHTS}"
            )
        return config

    @property
    def usable_length(self) -> int:
        """Positions that the model was made for: with YaRN, those that it extends them to."""
        if self.rope.factor is None:
            return self.max_position_embeddings
        extended = int(self.rope.original_max_position * self.rope.factor)
        return max(self.max_position_embeddings, extended)

    @property
    def num_weights(self) -> int:
        """Weights of all matrices; norms and biases, about a thousandth of them, do not count."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        embeddings = 1 if self.tie_word_embeddings else 2
        return self.num_hidden_layers * layer + embeddings * self.vocab_size * self.hidden_size

    def sizes(self) -> str:
        """The fields that make up `num_weights`, for errors."""
        names = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def _checked(fields: Mapping[str, Any], rules: Mapping[str, tuple[Rule, Any]]) -> dict[str, Any]:
    """The value of every field in `rules`, checked; of an absent one, its default."""
    values = {}
    for name, (rule, default) in rules.items():
        if name not in fields and default is REQUIRED:
            raise UnsupportedModelError(f"config.json: {name} is missing")
        values[name] = _check(name, fields.get(name, default), rule)
    return values


def _check(name: str, value: Any, rule: Rule, file: str = "config.json") -> Any:
    try:
        return rule(value)
    except ValueError as allowed:
        raise UnsupportedModelError(
            f"{file}: {name}={shown(value)} is not supported: it must be {allowed}"
        ) from None


def shown(value: Any) -> str:
    """A value in an error, however long or deep it is."""
    printer = reprlib.Repr()
    printer.maxstring = printer.maxother = 80
    return printer.repr(value)


def _check_architecture(fields: Mapping[str, Any]) -> None:
    named = fields.get("architectures")
    named = [] if named is None else named
    known = isinstance(named, list) and all(isinstance(name, str) for name in named)
    if known and named:
        known = ARCHITECTURE in named or BASE_ARCHITECTURE in named
    if fields.get("model_type") != "qwen3" or not known:
        raise UnsupportedModelError(
            f"config.json: architecture {shown(named).strip(QUOTES)} "
            f"(model_type={shown(fields.get('model_type'))}) is not "
            f"supported: only {ARCHITECTURE} (model_type='qwen3') is"
        )


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


def _parse_rope(fields: Mapping[str, Any], values: Mapping[str, Any]) -> RopeConfig:
    """`rope_theta` + `rope_scaling` (4.x) and `rope_parameters` (5.x); of both, the former wins."""
    given = values["rope_scaling"] or values["rope_parameters"] or {}
    # An older name, which counts only where the newer one is absent.
    rope = {"rope_type": given["type"]} if "type" in given else {}
    if "rope_theta" in fields:
        rope["rope_theta"] = fields["rope_theta"]
    rope.update(given)
    common = _checked(rope, ROPE_FIELDS)
    theta = common["rope_theta"]
    if common["rope_type"] == "default":
        return RopeConfig(theta)
    original = "original_max_position_embeddings"
    rope.setdefault(original, values["max_position_embeddings"])
    if original in fields:
        rope[original] = fields[original]
    yarn = _checked(rope, YARN_FIELDS)
    if theta == 1:
        raise UnsupportedModelError("config.json: rope_theta=1 is not supported with YaRN")
    factor = yarn["factor"] or values["max_position_embeddings"] / yarn[original]
    return RopeConfig(
        theta=theta,
        factor=factor,
        original_max_position=yarn[original],
        attention_factor=yarn["attention_factor"] or _attention_factor(yarn, factor),
        beta_fast=yarn["beta_fast"] or 32.0,
        beta_slow=yarn["beta_slow"] or 1.0,
        truncate=yarn["truncate"],
    )


def _attention_factor(yarn: Mapping[str, Any], factor: float) -> float:
    """Scale of cos and sin, YaRN (https://arxiv.org/abs/2309.00071), equation 22."""

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = yarn["mscale"], yarn["mscale_all_dim"]
    if mscale and mscale_all:
        return magnitude(mscale) / magnitude(mscale_all)
    return magnitude(1.0)
