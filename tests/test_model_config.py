"""config.json: what is understood as transformers does, and what is refused by name."""

from dataclasses import fields as dataclass_fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.rotary_embedding import cos_sin_table
from nanovllm.models import ModelConfig, UnsupportedModelError, parse_config
from nanovllm.models.rope import ROPES as ROPE_KINDS
from tests.checkpoints import FIELD_NAMES, TABLE

YARN = {"factor": 4.0, "original_max_position_embeddings": 64}

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config_fields(model_type: str = "qwen3", /, **changes: Any) -> dict[str, Any]:
    """A small config.json; `...` drops a field."""
    given = {
        "architectures": [TABLE[model_type].name],
        "model_type": model_type,
        "vocab_size": 512,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 1,
        **changes,
    }
    return {name: value for name, value in given.items() if value is not ...}


# ------------------------------------------------------------------ refused by name

QWEN3: list[tuple[dict[str, Any], list[str]]] = [
    ({"head_dim": None}, ["head_dim=None", "multiple of 2"]),
    ({"architectures": ["GemmaForCausalLM"]}, ["GemmaForCausalLM", "Qwen3ForCausalLM"]),
    ({"architectures": "Qwen3Model"}, ["architecture 'Qwen3Model'"]),
    ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, ["qwen3_moe"]),
    ({"model_type": "gemma"}, ["model_type='gemma'"]),
    ({"model_type": ...}, ["model_type=None"]),
    ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_type='longrope'", "'yarn'"]),
    ({"rope_scaling": {"type": "linear"}}, ["rope_type='linear'"]),
    ({"rope_scaling": "yarn"}, ["rope_scaling='yarn'"]),
    ({"rope_parameters": {"rope_type": "yarn", "factor": "x"}}, ["factor='x'"]),
    ({"rope_parameters": {"rope_type": "yarn"}}, ["factor is missing"]),
    ({"rope_parameters": {"rope_theta": -1}}, ["rope_theta=-1"]),
    (
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        ["rope_parameters={'full_attention'", "flat"],
    ),
    (
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        ["use_sliding_window=True", "must be False", "max_window_layers=1"],
    ),
    ({"use_sliding_window": True, "max_window_layers": 1}, ["use_sliding_window=True"]),
    ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
    ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "must be one of 'silu'"]),
    ({"is_causal": False}, ["is_causal=False", "True"]),
    ({"attention_chunk_size": 16}, ["attention_chunk_size=16"]),
    ({"kv_sharing_modes": ["store", "reuse"]}, ["kv_sharing_modes="]),
    ({"attribute_map": {"num_hidden_layers": "n"}}, ["attribute_map="]),
    ({"quantization_config": {"quant_method": "awq"}}, ["quantization_config=", "awq"]),
    ({"num_key_value_heads": 3}, ["num_attention_heads=4", "num_key_value_heads=3"]),
    ({"num_attention_heads": 0}, ["num_attention_heads=0", "an integer from 1 to"]),
    ({"num_hidden_layers": True}, ["num_hidden_layers=True", "an integer from 1 to"]),
    ({"vocab_size": None}, ["vocab_size=None", "an integer from 1 to"]),
    ({"hidden_size": 32.0}, ["hidden_size=32.0", "an integer from 1 to"]),
    ({"intermediate_size": "64"}, ["intermediate_size='64'", "an integer from 1 to"]),
    ({"max_position_embeddings": -5}, ["max_position_embeddings=-5", "an integer from 1 to"]),
    ({"head_dim": 63}, ["head_dim=63", "multiple of 2"]),
    ({"rms_norm_eps": "small"}, ["rms_norm_eps='small'"]),
    ({"rope_theta": 10**30}, ["rope_theta=1000", "an integer below 2**63"]),
    ({"rope_theta": 2**63}, ["rope_theta=9223372036854775808", "an integer below 2**63"]),
    ({"rms_norm_eps": None}, ["rms_norm_eps=None"]),
    ({"dtype": "float64"}, ["dtype='float64'", "bfloat16"]),
    ({"torch_dtype": "int8"}, ["dtype='int8'"]),
    ({"eos_token_id": "1"}, ["eos_token_id='1'"]),
    ({"eos_token_id": [1, None]}, ["eos_token_id=[1, None]"]),
]

REFUSED: dict[str, list[tuple[dict[str, Any], list[str]]]] = {
    "qwen3": QWEN3,
    "qwen2": [
        (
            {"head_dim": ..., "hidden_size": 60},
            ["head_dim", "15", "hidden_size=60", "multiple of 2"],
        ),
        (
            {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
            ["use_sliding_window=True", "max_window_layers=1"],
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_type='llama3'", "'yarn'"]),
    ],
    "llama": [
        ({"attention_bias": True}, ["attention_bias=True", "False"]),
        ({"mlp_bias": True}, ["mlp_bias=True", "False"]),
        ({"pretraining_tp": 2}, ["pretraining_tp=2", "1"]),
        ({"sliding_window": 4096}, ["sliding_window=4096", "None"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'"]),
        ({"rope_scaling": {**LLAMA3, "factor": None}}, ["factor=None", "positive"]),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 0}}, ["low_freq_factor=0", "positive"]),
        (
            {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}},
            ["high_freq_factor=1", "low_freq_factor=1"],
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor is missing"]),
    ],
}


def refused(fields: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        parse_config(fields)
    return str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [(kind, *case) for kind, cases in REFUSED.items() for case in cases],
    ids=str,
)
def test_a_model_that_is_not_supported_is_refused_by_name(model_type, changes, words):
    message = refused(config_fields(model_type, **changes))
    assert [word for word in ["config.json", *words] if word not in message] == []


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
KEYS = st.sampled_from([*FIELD_NAMES, "architectures", "type"])
OBJECTS = st.dictionaries(KEYS, SCALARS | st.sampled_from(list(ROPE_KINDS)), max_size=5)
VALUES = SCALARS | OBJECTS | st.lists(SCALARS | OBJECTS, max_size=4)


@given(st.sampled_from(list(TABLE)), st.dictionaries(KEYS, VALUES, max_size=4), VALUES)
def test_whatever_json_holds_is_understood_or_refused_by_name(model_type, changes, generation_eos):
    message = None
    try:
        assert parse_config(config_fields(model_type, **changes), generation_eos).usable_length > 0
    except UnsupportedModelError as error:
        message = str(error)
    assert message is None or any(name in message for name in [*FIELD_NAMES, "architecture"])


@pytest.mark.parametrize("model_type", TABLE)
@pytest.mark.parametrize("other", TABLE)
def test_the_model_type_decides_and_architectures_must_agree(model_type, other):
    for name in (TABLE[other].name, TABLE[other].base_name):
        fields = config_fields(model_type, architectures=[name])
        if model_type == other:
            assert parse_config(fields).architecture == TABLE[model_type].name
        else:
            message = refused(fields)
            assert f"[{name!r}]" in message
            assert f"model_type={model_type!r}" in message
    for none in (None, [], ...):
        parsed = parse_config(config_fields(model_type, architectures=none))
        assert parsed.architecture == TABLE[model_type].name


@pytest.mark.parametrize(
    ("size", "heads", "named"),
    [
        (3, (4, 2), "num_attention_heads=4"),
        (8, (4, 2), "num_attention_heads=4"),
        (2, (12, 3), "num_key_value_heads=3"),
    ],
)
def test_a_model_that_cannot_be_split_evenly_is_refused(size, heads, named):
    changes = dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True))
    message = f"^tensor_parallel_size={size} .*{named}$"
    with pytest.raises(UnsupportedModelError, match=message):
        parse_config(config_fields(**changes)).rank_heads(ParallelGroup(0, size))


# ------------------------------------------------------------------ understood


@pytest.mark.parametrize("model_type", TABLE)
def test_absent_fields_have_the_defaults_of_transformers(model_type):
    theirs, ours = AutoConfig.for_model(model_type), parse_config({"model_type": model_type})
    names = {field.name for field in dataclass_fields(ModelConfig)}
    shared = names & theirs.to_dict().keys() - {"dtype"}
    assert len(shared) >= 9
    for name in shared:
        assert getattr(ours, name) == getattr(theirs, name), name
    eos = [] if theirs.eos_token_id is None else [theirs.eos_token_id]
    assert list(ours.eos_token_ids) == eos
    assert ours.rope.parameters["rope_theta"] == theirs.rope_parameters["rope_theta"]


def test_old_and_new_spellings_mean_the_same():
    """Others are drawn in test_checkpoint_variants.py."""
    rope = {"rope_type": "yarn", "rope_theta": 5e5, **YARN}
    old = {"torch_dtype": "float16", "rope_theta": 5e5, "rope_scaling": {"type": "yarn", **YARN}}
    first = parse_config(config_fields(**old))
    assert first == parse_config(config_fields(dtype="float16", rope_parameters=rope))
    assert first != parse_config(config_fields(dtype="bfloat16", rope_parameters=rope))
    rope["rope_theta"] = 123.0
    assert first != parse_config(config_fields(dtype="float16", rope_parameters=rope))


def test_llama_3_is_understood_as_published():
    """In transformers 4.x, as on the hub; and as 5.x saves it."""
    old = {"rope_theta": 500_000.0, "rope_scaling": LLAMA3, "pretraining_tp": 1}
    eos = [128_001, 128_008, 128_009]
    config = parse_config(config_fields("llama", **old, eos_token_id=eos), eos)
    new = {"rope_parameters": {**LLAMA3, "rope_theta": 500_000.0}}
    assert config == parse_config(config_fields("llama", **new, eos_token_id=eos))
    assert config.eos_token_ids == tuple(eos)
    rope = config.rope.parameters
    assert (rope["rope_theta"], rope["factor"]) == (500_000.0, 8.0)
    assert config.usable_length == 256
    assert (config.qk_norm, config.qkv_bias, config.o_bias) == (False, False, False)


def test_the_default_eos_counts_only_where_no_file_has_one():
    assert parse_config(config_fields("llama", eos_token_id=...)).eos_token_ids == (2,)
    assert parse_config(config_fields("llama", eos_token_id=...), [9]).eos_token_ids == (9,)


def test_what_rope_scaling_lacks_is_not_taken_from_rope_parameters():
    scaling = {"rope_type": "yarn", **YARN}
    both = {"rope_scaling": scaling, "rope_parameters": {"rope_theta": 5e5, "beta_fast": 8}}
    rope = parse_config(config_fields(**both)).rope.parameters
    assert (rope["rope_theta"], rope["beta_fast"]) == (10_000.0, None)
    rope = parse_config(config_fields(**both, rope_theta=1e6)).rope.parameters
    assert rope["rope_theta"] == 1e6


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
        {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 0},
    ],
    ids=str,
)
def test_a_sliding_window_that_no_layer_has_does_not_matter(changes):
    assert parse_config(config_fields(**changes)) == parse_config(config_fields())


def test_eos_ids_of_both_files_are_joined():
    config = parse_config(config_fields(eos_token_id=[3, 4]), [4, 5])
    assert config.eos_token_ids == (3, 4, 5)
    assert parse_config(config_fields(), 7).eos_token_ids == (1, 7)
    assert parse_config(config_fields(eos_token_id=None)).eos_token_ids == ()


@pytest.mark.parametrize("absent", [..., None])
def test_without_head_dim_it_is_hidden_size_by_heads(absent):
    config = parse_config(config_fields("qwen2", head_dim=absent, hidden_size=96))
    assert config.head_dim == 24


def test_qwen2_has_biases_whatever_attention_bias_says():
    """It is no field of it, and transformers takes no notice."""
    for bias in (True, False, "x", ...):
        config = parse_config(config_fields("qwen2", attention_bias=bias))
        assert (config.qk_norm, config.qkv_bias, config.o_bias) == (False, True, False)


# ------------------------------------------------------------------ rope

ROPES = {
    "default": [{"rope_theta": 1e4}, {"rope_theta": 1e6}],
    "yarn": [
        {"rope_theta": 1e6, "factor": 4.0},
        {"rope_theta": 1e4, "factor": 2.0, "beta_fast": 16.0, "beta_slow": 2.0},
        {"rope_theta": 1e4, "factor": 8.0, "attention_factor": 0.7},
        {"rope_theta": 1e4, "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.1},
        {"rope_theta": 1e6, "factor": 4.0, "truncate": False},
    ],
    "llama3": [
        {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_theta": 5e5, "factor": 32, "low_freq_factor": 1, "high_freq_factor": 4},
        {"rope_theta": 1e4, "factor": 2.0, "low_freq_factor": 0.3, "high_freq_factor": 17.0},
    ],
}
LONGEST = 4096


def with_rope(model_type: str, rope_type: str, head_dim: int, **rope: Any) -> dict[str, Any]:
    rope |= {"rope_type": rope_type}
    if rope_type != "default":
        rope |= {"original_max_position_embeddings": 128}
    return config_fields(
        model_type, head_dim=head_dim, max_position_embeddings=LONGEST, rope_parameters=rope
    )


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("model_type", "rope_type", "rope"),
    [
        (kind, rope_type, rope)
        for kind, entry in TABLE.items()
        for rope_type in entry.ropes
        for rope in ROPES[rope_type]
    ],
    ids=str,
)
def test_the_rope_table_is_that_of_transformers(model_type, rope_type, rope, head_dim):
    fields = with_rope(model_type, rope_type, head_dim, **rope)
    ours = parse_config(fields).rope
    theirs = AutoModel.from_config(AutoConfig.for_model(**fields)).rotary_emb
    cos, sin = theirs(torch.zeros(1), torch.arange(LONGEST)[None])
    half = head_dim // 2
    expected = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=1)
    table = cos_sin_table(ours, head_dim, LONGEST)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-6)
    if rope_type != "default":  # or else the above would prove little
        unscaled = parse_config(config_fields(rope_theta=rope["rope_theta"])).rope
        assert not torch.allclose(table, cos_sin_table(unscaled, head_dim, LONGEST), atol=1e-2)
