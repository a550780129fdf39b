"""config.json of a Qwen3 checkpoint, parsed and checked into one frozen record.

It is read directly rather than through transformers, so that every version's spelling (4.51
to 5.x) is understood by any installed one, and what the engine cannot run is refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanovllm.layers.rotary_embedding import RopeConfig
from nanovllm.utils.options import is_int

ARCHITECTURE = "Qwen3ForCausalLM"
DTYPES = ("float32", "bfloat16", "float16")


class UnsupportedModelError(ValueError):
    """The checkpoint is readable, but asks for something that this engine does not do."""


@dataclass(frozen=True)
class Qwen3Config:
    """Shape of a Qwen3 model; names as in config.json."""

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
    dtype: str
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, directory: Path) -> Qwen3Config:
        """Reads `config.json` and, for more end-of-sequence ids, `generation_config.json`.

        Raises:
            FileNotFoundError: there is no config.json.
            UnsupportedModelError: it is no Qwen3 dense model, or one with unknown features.
        """
        path = directory / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no config.json: not a model directory")
        fields = _read_object(path)
        generation = directory / "generation_config.json"
        also = _read_object(generation).get("eos_token_id") if generation.is_file() else None
        return cls.from_dict(fields, also)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], generation_eos: Any = None) -> Qwen3Config:
        """Checks the parsed config.json; `generation_eos` as in generation_config.json."""
        _refuse_unsupported(fields)
        heads = _positive_int(fields, "num_attention_heads")
        kv_heads = _positive_int(fields, "num_key_value_heads", default=heads)
        hidden = _positive_int(fields, "hidden_size")
        if heads % kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}"
            )
        max_position = _positive_int(fields, "max_position_embeddings")
        head_dim = _positive_int(fields, "head_dim", default=hidden // heads)
        if head_dim % 2:
            raise UnsupportedModelError(f"head_dim={head_dim} is not even, as rope needs it to be")
        dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise UnsupportedModelError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
        return cls(
            vocab_size=_positive_int(fields, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_positive_int(fields, "intermediate_size"),
            num_hidden_layers=_positive_int(fields, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_position,
            rms_norm_eps=_positive(fields, "rms_norm_eps", default=1e-6),
            rope=_parse_rope(fields, max_position),
            tie_word_embeddings=bool(fields.get("tie_word_embeddings", False)),
            attention_bias=bool(fields.get("attention_bias", False)),
            dtype=dtype,
            eos_token_ids=tuple(
                dict.fromkeys((*_eos_ids(fields.get("eos_token_id")), *_eos_ids(generation_eos)))
            ),
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UnsupportedModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(f"{path} does not hold a JSON object")
    return value


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    architectures = fields.get("architectures") or []
    if fields.get("model_type") != "qwen3" or architectures not in ([], [ARCHITECTURE]):
        raise UnsupportedModelError(
            f"architecture {architectures} (model_type={fields.get('model_type')!r}) is not "
            f"supported: only {ARCHITECTURE} (model_type='qwen3') is"
        )
    allowed: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
        "quantization_config": (None,),
    }
    for name, values in allowed.items():
        if name in fields and fields[name] not in values:
            raise UnsupportedModelError(
                f"{name}={fields[name]!r} is not supported: it must be {values[0]!r}"
            )
    if any(kind != "full_attention" for kind in fields.get("layer_types") or []):
        raise UnsupportedModelError("layer_types other than 'full_attention' are not supported")


def _positive_int(fields: dict[str, Any], name: str, default: int | None = None) -> int:
    value: Any = fields.get(name)
    if value is None:
        value = default
    if not is_int(value) or value < 1:
        raise UnsupportedModelError(f"config.json: {name}={value!r} is not a positive integer")
    return value


def _positive(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UnsupportedModelError(f"config.json: {name}={value!r} is not a positive number")
    return float(value)


def _eos_ids(value: Any) -> list[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(is_int(token) for token in ids):
        raise UnsupportedModelError(f"eos_token_id={value!r} is neither an integer nor a list")
    return ids


def _parse_rope(fields: dict[str, Any], max_position: int) -> RopeConfig:
    """Understands `rope_theta` + `rope_scaling` (4.x) and `rope_parameters` (5.x)."""
    rope: dict[str, Any] = {}
    parts = {name: fields.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, part in {"": {"rope_theta": fields.get("rope_theta")}, **parts}.items():
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            raise UnsupportedModelError(
                f"{name}={part!r} is not supported: it must be a flat object"
            )
        rope.update((key, value) for key, value in part.items() if value is not None)
    theta = _positive(rope, "rope_theta", default=10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind != "yarn":
        raise UnsupportedModelError(
            f"rope_type={kind!r} is not supported: only 'default' and 'yarn' are"
        )
    original = _positive_int(rope, "original_max_position_embeddings", default=max_position)
    factor = _positive(rope, "factor", default=max_position / original)
    return RopeConfig(
        theta=theta,
        factor=factor,
        original_max_position=original,
        attention_factor=_yarn_attention_factor(rope, factor),
        beta_fast=_positive(rope, "beta_fast", default=32.0),
        beta_slow=_positive(rope, "beta_slow", default=1.0),
        truncate=bool(rope.get("truncate", True)),
    )


def _yarn_attention_factor(rope: dict[str, Any], factor: float) -> float:
    """Scale of cos and sin, YaRN (https://arxiv.org/abs/2309.00071), equation 22."""
    if "attention_factor" in rope:
        return _positive(rope, "attention_factor", default=1.0)

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and mscale_all:
        return magnitude(mscale) / magnitude(mscale_all)
    return magnitude(1.0)
