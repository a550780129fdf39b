"""Options: each bad value is refused with its field, itself and what is allowed."""

import copy
import dataclasses
import inspect
import math
from enum import Enum, IntEnum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from nanovllm import Config, SamplingParams
from nanovllm.config import PIPELINE_MODES
from nanovllm.tiny import CHECKPOINT_DIR

POSITIVE = "an integer of at least 1"
BOOLEAN = "True or False"
NOT_POSITIVE = (0, -1, True, 1.5, 4.0, "8", None)
NOT_BOOLEANS = (0, 1, "yes", None)

# Each field of `Config` with what its error says is allowed, and values that it refuses.
BAD_CONFIG = {
    "model": ("a directory or a hub id", ("", None, 5, True, b"dir", ["dir"])),
    "max_num_batched_tokens": (POSITIVE, NOT_POSITIVE),
    "max_num_seqs": ("an integer from 1 to 1048576", (2**20 + 1, *NOT_POSITIVE)),
    "max_model_len": ("an integer of at least 2", (1, *NOT_POSITIVE)),
    "gpu_memory_utilization": ("a number above 0 to 1", (0, 1.01, math.nan, True, "0.9", None)),
    "tensor_parallel_size": (POSITIVE, NOT_POSITIVE),
    "enforce_eager": (BOOLEAN, NOT_BOOLEANS),
    "kvcache_block_size": (
        "an integer from 16 to 1048576 and a multiple of 16",
        (8, 17, 100, 256.0, 2**21, 16 * 10**30),
    ),
    "num_kvcache_blocks": (
        "an integer from 1 to 2147483647 or -1",
        (0, -2, True, 1.0, "8", None, 2**31, 10**30),
    ),
    "device": ("'auto', 'cpu', 'cuda' or 'cuda:N'", ("", "gpu", "cuda:", "cuda:x", "CPU", 0, None)),
    "dtype": ("one of 'auto', 'float32', 'bfloat16', 'float16'", ("", "float64", 32, None)),
    "load_format": ("one of 'auto', 'dummy'", ("", "gguf", "Auto", None)),
    "attention_backend": ("one of 'auto', 'triton', 'flash_attn', 'torch'", ("", "TORCH", None)),
    "enable_prefix_caching": (BOOLEAN, NOT_BOOLEANS),
    "async_scheduling": (BOOLEAN, NOT_BOOLEANS),
    "enable_pipeline": (BOOLEAN, NOT_BOOLEANS),
    "pipeline_attention_sm_count": (POSITIVE, NOT_POSITIVE),
    "pipeline_ffn_sm_count": (POSITIVE, NOT_POSITIVE),
    "pipeline_enable_profiling": (BOOLEAN, NOT_BOOLEANS),
    "pipeline_mode": (f"one of {str(PIPELINE_MODES)[1:-1]}", ("", "fast", "Green", None)),
    "pipeline_strict": (BOOLEAN, NOT_BOOLEANS),
    "all_reduce": ("one of 'auto', 'nccl'", ("", "NCCL", None)),
    "step_timeout": ("a number above 0 to 86400", (0, -1, math.inf, True, "60", None)),
    "generation_config": ("one of 'auto', 'none'", ("", "vllm", None)),
}

BAD_SAMPLING = {
    "temperature": ("a number from 0 to 100", (-0.1, 100.5, math.nan, math.inf, True, "1", None)),
    "top_k": ("an integer of at least 0 or -1", (-2, True, 2.0, "5", None)),
    "top_p": ("a number above 0 to 1", (0, -0.5, 1.5, math.nan, True, "1", None)),
    "max_tokens": (f"None or {POSITIVE}", NOT_POSITIVE[:-1]),
    "ignore_eos": (BOOLEAN, NOT_BOOLEANS),
    "stop_token_ids": (
        "None or a sequence of token ids, integers of at least 0",
        (5, "12", b"12", [1, "2"], [-1], [True], [1.0], [[1]], {5: 6}, np.array(5)),
    ),
    "seed": (f"None or an integer from 0 to {2**63 - 1}", (-2, 2**63, True, 1.0, "1")),
    "presence_penalty": ("a number from -2 to 2", (-2.1, 2.1, math.nan, True, "1", None)),
    "frequency_penalty": ("a number from -2 to 2", (-2.1, 2.1, math.nan, True, "1", None)),
    "repetition_penalty": ("a number above 0 to 100", (0, -1, 101, math.inf, True, "1", None)),
    "min_p": ("a number from 0 to 1", (-0.1, 1.1, math.nan, True, "1", None)),
    "min_tokens": ("an integer of at least 0", (-1, True, 1.0, "1", None)),
    "logit_bias": (
        "None or a dict of token ids and numbers from -inf to 1e6",
        (
            *(5, "12", [1, 2], [[1, 2]], {-1: 0}, {True: 1}, {1.0: 1}, {"x": 1}, {"-1": 1}),
            *({1: None}, {1: "2"}, {1: math.nan}, {1: math.inf}, {1: 2e6}, {1: True}),
        ),
    ),
    "logprobs": ("None or an integer from 0 to 20", (-1, 21, True, 1.0, "1")),
    "prompt_logprobs": ("None or an integer from 0 to 20", (-1, 21, True, 1.0, "1")),
    "stop": (
        "None, a text or several texts, none of them empty",
        ("", b"x", 5, True, [""], ["a", ""], ["a", None], [5], [b"a"], {"a": 1}, [["a"]]),
    ),
    "include_stop_str_in_output": (BOOLEAN, NOT_BOOLEANS),
    "skip_special_tokens": (BOOLEAN, NOT_BOOLEANS),
    "n": (POSITIVE, NOT_POSITIVE),
    "json_schema": ("a JSON schema, as a dict or as JSON text", (5, [], {1, 2}, b"{}")),
    "regex": ("None or a text that is not empty", (5, "", b"a", ["a"])),
    "grammar": ("None or a text that is not empty", (5, "", {"root": "a"})),
}


def cases(table):
    return [
        pytest.param(field, value, allowed, id=f"{field}={value!r}")
        for field, (allowed, values) in table.items()
        for value in values
    ]


def check_refused(action, field, value, allowed) -> None:
    with pytest.raises(ValueError, match="not allowed") as caught:
        action()
    assert str(caught.value).startswith(f"{field}={value!r} ")
    assert str(caught.value).endswith(allowed)


@pytest.mark.parametrize(
    ("cls", "table"),
    [(Config, BAD_CONFIG), (SamplingParams, BAD_SAMPLING)],
    ids=["Config", "Sampl"],
)
def test_the_tables_of_bad_values_name_every_field(cls, table):
    assert list(table) == [field.name for field in dataclasses.fields(cls)]


@pytest.mark.parametrize(("field", "value", "allowed"), cases(BAD_CONFIG))
def test_config_refuses(field, value, allowed):
    check_refused(lambda: Config(**{field: value}), field, value, allowed)
    config = Config()
    check_refused(lambda: setattr(config, field, value), field, value, allowed)
    assert getattr(config, field) == getattr(Config(), field)  # as it was


@pytest.mark.parametrize(("field", "value", "allowed"), cases(BAD_SAMPLING))
def test_sampling_params_refuse(field, value, allowed):
    check_refused(lambda: SamplingParams(**{field: value}), field, value, allowed)
    replace = dataclasses.replace
    check_refused(lambda: replace(SamplingParams(), **{field: value}), field, value, allowed)


@pytest.mark.parametrize("cls", [Config, SamplingParams])
def test_editors_see_the_options_and_their_defaults(cls):
    parameters = inspect.signature(cls).parameters
    assert {name: p.default for name, p in parameters.items()} == dataclasses.asdict(cls())


@pytest.mark.parametrize(
    ("cls", "option", "nearest"),
    [
        (Config, "max_seqs", "max_num_seqs"),
        (Config, "block_size", "kvcache_block_size"),
        (Config, "Model", "model"),
        (Config, "tensor_parallel", "tensor_parallel_size"),
        (Config, "pipeline_attn_sm_count", "pipeline_attention_sm_count"),
        (SamplingParams, "max_new_tokens", "max_tokens"),
        (SamplingParams, "topK", "top_k"),
        (SamplingParams, "temprature", "temperature"),
    ],
)
def test_an_unknown_option_is_named_with_the_nearest_valid_one(cls, option, nearest):
    for use in (cls, partial(dataclasses.replace, cls())):
        with pytest.raises(TypeError, match=f"^{cls.__name__} .*'{option}'.*'{nearest}'"):
            use(**{option: 1})
    if cls is Config:
        with pytest.raises(TypeError, match=f"'{option}'.*'{nearest}'"):
            setattr(Config(), option, 1)


@pytest.mark.parametrize("option", ["seed", "quantization", "trust_remote_code", "x" * 10**6])
def test_an_option_that_resembles_nothing_gets_no_hint(option):
    with pytest.raises(TypeError, match=f"^Config has no option '{option[:20]}") as caught:
        Config(**{option: 1})
    assert "nearest" not in str(caught.value)
    assert len(str(caught.value)) < 200


# Numbers of other makers.


class Index:
    """Like a number of another library: it says that it is whole, and nothing else."""

    def __index__(self) -> int:
        return 8


WHOLE = [
    *(np.dtype(name).type(8) for name in ("int8", "int16", "int32", "int64", "uint8", "uint64")),
    *(torch.tensor(8, dtype=dtype) for dtype in (torch.int8, torch.int32, torch.int64)),
    np.array(8),
    Index(),
    IntEnum("Eight", {"EIGHT": 8}).EIGHT,
]
REAL = [
    *(np.dtype(name).type(0.5) for name in ("float16", "float32", "float64")),
    *(torch.tensor(0.5, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    torch.tensor(0.5, requires_grad=True),
    np.array(0.5),
]


def name_of(value: object) -> str:
    return f"{type(value).__name__}-{getattr(value, 'dtype', '')}"


@pytest.mark.parametrize("value", WHOLE, ids=name_of)
def test_whole_numbers_of_any_maker_become_ints(value):
    params = SamplingParams(top_k=value, seed=value, stop_token_ids=[value])
    for taken in (params.top_k, params.seed, *params.stop_token_ids, Config(max_model_len=value)):
        taken = getattr(taken, "max_model_len", taken)
        assert (taken, type(taken)) == (8, int)


@pytest.mark.parametrize(
    "value",
    [Enum("Auto", {"AUTO": "auto"}, type=str).AUTO, np.str_("auto"), np.array("auto")],
    ids=name_of,
)
def test_texts_of_any_maker_become_strings(value):
    params = SamplingParams(stop=value, regex=value)
    for taken in (
        *params.stop,
        *SamplingParams(stop=[value]).stop,
        params.regex,
        Config(dtype=value),
    ):
        taken = getattr(taken, "dtype", taken)
        assert (taken, type(taken)) == ("auto", str)


@pytest.mark.parametrize("value", REAL, ids=name_of)
def test_real_numbers_of_any_maker_become_floats(value):
    taken = SamplingParams(temperature=value).temperature
    assert (taken, type(taken)) == (0.5, float)
    with pytest.raises(ValueError, match=r"^max_tokens=.*[^$]* an integer"):
        SamplingParams(max_tokens=value)


@pytest.mark.parametrize(
    "ids", [np.array([5, 6]), torch.tensor([5, 6]), range(5, 7), iter((5, 6)), {5, 6}]
)
def test_arrays_of_token_ids_become_tuples_of_ints(ids):
    taken = SamplingParams(stop_token_ids=ids).stop_token_ids
    assert taken == (5, 6)
    assert {type(token) for token in taken} == {int}


@pytest.mark.parametrize("truth", [np.True_, torch.tensor(True), np.array(True)], ids=name_of)
def test_booleans_of_any_maker_are_booleans_and_no_numbers(truth):
    assert SamplingParams(ignore_eos=truth).ignore_eos is True
    for field in ("temperature", "top_k", "top_p", "max_tokens", "seed"):
        with pytest.raises(ValueError, match=f"^{field}=.*not allowed"):
            SamplingParams(**{field: truth})
    with pytest.raises(ValueError, match=r"^stop_token_ids=.*not allowed"):
        SamplingParams(stop_token_ids=[truth])


NO_NUMBERS = [
    *(np.array([8]), np.array([]), np.float64("nan"), np.float32("inf"), np.complex64(1)),
    *(torch.tensor([8]), torch.tensor([[8.0]]), torch.tensor(float("nan")), torch.tensor(1j)),
    *(np.str_("8"), "8", b"8", [8], {8}, object(), int, Path("8"), -(10**400), "x" * 10**6),
    # Python refuses to print these.
    *(-(10**5000), [10**5000]),
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: type(value).__name__)
def test_what_is_no_number_is_refused_with_a_short_error(value):
    for field in ("temperature", "top_k", "top_p", "max_tokens", "seed", "ignore_eos"):
        with pytest.raises(ValueError, match=f"^{field}=") as caught:
            SamplingParams(**{field: value})
        assert str(caught.value).endswith(BAD_SAMPLING[field][0])
        assert len(str(caught.value)) < 250


def test_words_of_any_maker_become_strings():
    config = Config(dtype=np.str_("float32"), device=np.str_("cuda:1"))
    assert (type(config.dtype), type(config.device)) == (str, str)
    for device in ("cuda:\u0661", "cuda:1\n"):
        with pytest.raises(ValueError, match=r"^device="):
            Config(device=device)


def test_sampling_params_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5


def test_the_defaults_are_the_documented_ones():
    assert dataclasses.astuple(Config()) == (
        *(str(CHECKPOINT_DIR), 16384, 512, 4096, 0.9, 1, False, 256, -1),
        *("auto", "auto", "auto", "auto", True, True),
        *(False, 16, 16, False, "auto", False, "auto", 60.0, "auto"),
    )
    assert dataclasses.astuple(SamplingParams()) == (
        *(1.0, -1, 1.0, 64, False, (), None),
        *(0.0, 0.0, 1.0, 0.0, 0, None),
        *(None, None),
        *((), False, True, 1),
        *(None, None, None),
    )


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
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()


@pytest.mark.parametrize(
    "bias", [{5: 1, 6: -np.inf}, {"5": 1.0, np.int64(6): -math.inf}, {"5": 3, 5: 1, 6: -math.inf}]
)
def test_a_bias_is_kept_as_pairs_that_nobody_can_change(bias):
    """So that the options are one hashable value, and equal if they mean the same."""
    params = SamplingParams(logit_bias=bias)
    assert params.logit_bias == ((5, 1.0), (6, -math.inf))
    assert {type(x) for pair in params.logit_bias for x in pair} == {int, float}
    assert len({params, dataclasses.replace(params), copy.deepcopy(params)}) == 1


def test_no_fewer_tokens_than_there_may_be_at_most():
    assert SamplingParams(min_tokens=3, max_tokens=3).min_tokens == 3
    with pytest.raises(ValueError, match=r"^min_tokens=4 is not allowed: .* most max_tokens=3$"):
        SamplingParams(min_tokens=4, max_tokens=3)


def test_numbers_that_no_float_holds_are_refused_like_others():
    with pytest.raises(ValueError, match=r"^logit_bias=.*-inf to 1e6"):
        SamplingParams(logit_bias={1: -(10**400)})
    with pytest.raises(ValueError, match=r"^min_tokens=<an integer of \d+ bits> .*max_tokens=64"):
        SamplingParams(min_tokens=10**5000)


def test_minus_one_is_no_seed():
    assert SamplingParams(seed=-1) == SamplingParams(seed=None)
