"""Options: each bad value is refused with its field, itself and what is allowed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from nanovllm import Config, SamplingParams
from nanovllm.config import PIPELINE_MODES
from nanovllm.tiny import CHECKPOINT_DIR

POSITIVE = "an integer of at least 1"
BOOLEAN = "True or False"
NOT_POSITIVE_INTEGERS = (0, -1, True, 1.5, 4.0, "8", None)
NOT_BOOLEANS = (0, 1, "yes", None)

# Each field of `Config` with what its error says is allowed, and values that it refuses.
BAD_CONFIG = {
    "model": ("a directory or a hub id", ("", None, 5, True, b"dir", ["dir"])),
    "max_num_batched_tokens": (POSITIVE, NOT_POSITIVE_INTEGERS),
    "max_num_seqs": (POSITIVE, NOT_POSITIVE_INTEGERS),
    "max_model_len": ("an integer of at least 2", (1, *NOT_POSITIVE_INTEGERS)),
    "gpu_memory_utilization": (
        "a number above 0 to 1",
        (0, -0.5, 1.01, math.nan, math.inf, True, "0.9", None),
    ),
    "tensor_parallel_size": (POSITIVE, NOT_POSITIVE_INTEGERS),
    "enforce_eager": (BOOLEAN, NOT_BOOLEANS),
    "kvcache_block_size": (
        "an integer of at least 16 and a multiple of 16",
        (8, 17, 100, -16, 256.0, *NOT_POSITIVE_INTEGERS),
    ),
    "num_kvcache_blocks": ("an integer of at least 1, or -1", (0, -2, True, 1.0, "8", None)),
    "device": (
        "'auto', 'cpu', 'cuda' or 'cuda:N'",
        ("", "gpu", "cuda:", "cuda:x", "CPU", "cpu:0", " cpu", 0, None),
    ),
    "dtype": (
        "one of 'auto', 'float32', 'bfloat16', 'float16'",
        ("", "float64", "bf16", "int8", 32, None),
    ),
    "load_format": ("one of 'auto', 'dummy'", ("", "gguf", "Auto", 1, None)),
    "attention_backend": (
        "one of 'auto', 'triton', 'flash_attn', 'torch'",
        ("", "flash-attn", "xformers", "TORCH", 1, None),
    ),
    "enable_prefix_caching": (BOOLEAN, NOT_BOOLEANS),
    "async_scheduling": (BOOLEAN, NOT_BOOLEANS),
    "enable_pipeline": (BOOLEAN, NOT_BOOLEANS),
    "pipeline_attention_sm_count": (POSITIVE, NOT_POSITIVE_INTEGERS),
    "pipeline_ffn_sm_count": (POSITIVE, NOT_POSITIVE_INTEGERS),
    "pipeline_enable_profiling": (BOOLEAN, NOT_BOOLEANS),
    "pipeline_mode": (
        "one of " + ", ".join(repr(mode) for mode in PIPELINE_MODES),
        ("", "fast", "Green", 1, None),
    ),
    "pipeline_strict": (BOOLEAN, NOT_BOOLEANS),
}

BAD_SAMPLING = {
    "temperature": ("a number from 0 to 100", (-0.1, 100.5, math.nan, math.inf, True, "1", None)),
    "top_k": ("an integer of at least 1, or -1", (0, -2, True, 2.0, "5", None)),
    "top_p": ("a number above 0 to 1", (0, -0.5, 1.5, math.nan, True, "1", None)),
    "max_tokens": (POSITIVE, NOT_POSITIVE_INTEGERS),
    "ignore_eos": (BOOLEAN, NOT_BOOLEANS),
    "stop_token_ids": (
        "a sequence of token ids, integers of at least 0",
        (5, None, "12", b"12", [1, "2"], [-1], [True], [1.0], [[1]]),
    ),
    "seed": ("None or an integer from 0 to 2**63 - 1", (-1, 2**63, True, 1.0, "1")),
}


def cases(table):
    return [
        pytest.param(field, value, allowed, id=f"{field}={value!r}")
        for field, (allowed, values) in table.items()
        for value in values
    ]


def error_of(action) -> str:
    with pytest.raises(ValueError, match="is not allowed") as caught:
        action()
    return str(caught.value)


@pytest.mark.parametrize(
    ("cls", "table"),
    [(Config, BAD_CONFIG), (SamplingParams, BAD_SAMPLING)],
    ids=["Config", "Sampl"],
)
def test_the_tables_of_bad_values_name_every_field(cls, table):
    assert list(table) == [field.name for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("field", "value", "allowed"), cases(BAD_CONFIG))
def test_config_refuses(field, value, allowed):
    message = f"{field}={value!r} is not allowed: it must be {allowed}"
    assert error_of(lambda: Config(**{field: value})) == message
    config = Config()
    assert error_of(lambda: setattr(config, field, value)) == message
    assert getattr(config, field) == getattr(Config(), field)  # as it was


@pytest.mark.parametrize(("field", "value", "allowed"), cases(BAD_SAMPLING))
def test_sampling_params_refuse(field, value, allowed):
    message = f"{field}={value!r} is not allowed: it must be {allowed}"
    assert error_of(lambda: SamplingParams(**{field: value})) == message
    assert error_of(lambda: dataclasses.replace(SamplingParams(), **{field: value})) == message


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("max_seqs", "max_num_seqs"),
        ("max_num_sequences", "max_num_seqs"),
        ("block_size", "kvcache_block_size"),
        ("enable_pipelining", "enable_pipeline"),
        ("Model", "model"),
    ],
)
def test_config_names_an_unknown_option_and_the_nearest_valid_one(option, nearest):
    message = f"Config has no option '{option}'; the nearest valid one is '{nearest}'"
    with pytest.raises(TypeError) as caught:
        Config(**{option: 1})
    assert str(caught.value) == message
    with pytest.raises(TypeError) as caught:
        setattr(Config(), option, 1)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("option", "nearest"),
    [("max_new_tokens", "max_tokens"), ("temp", "temperature"), ("topk", "top_k")],
)
def test_sampling_params_name_an_unknown_option_and_the_nearest_valid_one(option, nearest):
    with pytest.raises(TypeError) as caught:
        SamplingParams(**{option: 1})
    assert str(caught.value) == (
        f"SamplingParams has no option '{option}'; the nearest valid one is '{nearest}'"
    )


def test_an_option_that_resembles_nothing_still_gets_an_answer():
    with pytest.raises(TypeError, match="has no option 'zzz'; the nearest valid one is '"):
        Config(zzz=1)


def test_sampling_params_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5


def test_config_has_the_documented_defaults():
    assert dataclasses.asdict(Config()) == {
        "model": str(CHECKPOINT_DIR),
        "max_num_batched_tokens": 16384,
        "max_num_seqs": 512,
        "max_model_len": 4096,
        "gpu_memory_utilization": 0.9,
        "tensor_parallel_size": 1,
        "enforce_eager": False,
        "kvcache_block_size": 256,
        "num_kvcache_blocks": -1,
        "device": "auto",
        "dtype": "auto",
        "load_format": "auto",
        "attention_backend": "auto",
        "enable_prefix_caching": True,
        "async_scheduling": True,
        "enable_pipeline": False,
        "pipeline_attention_sm_count": 16,
        "pipeline_ffn_sm_count": 16,
        "pipeline_enable_profiling": False,
        "pipeline_mode": "auto",
        "pipeline_strict": False,
    }


def test_sampling_params_have_the_documented_defaults():
    assert dataclasses.asdict(SamplingParams()) == {
        "temperature": 1.0,
        "top_k": -1,
        "top_p": 1.0,
        "max_tokens": 64,
        "ignore_eos": False,
        "stop_token_ids": (),
        "seed": None,
    }


def test_good_values_at_the_limits_are_taken_and_normalised():
    config = Config(Path("a") / "b", 1, 1, 2, 1, kvcache_block_size=48, device="cuda:12")
    assert config.model == str(Path("a") / "b")
    assert config.max_model_len == 2
    assert isinstance(config.gpu_memory_utilization, float)
    config.num_kvcache_blocks = -1
    config.num_kvcache_blocks = 1
    assert config.num_kvcache_blocks == 1
    params = SamplingParams(0, 1, 1, stop_token_ids=[3, 4], seed=2**63 - 1)
    assert isinstance(params.temperature, float)
    assert params.stop_token_ids == (3, 4)
