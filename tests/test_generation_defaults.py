"""What generation_config.json says of sampling, and where it counts."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from nanovllm import LLM, Config, SamplingParams
from nanovllm.batch import lines
from nanovllm.models import UnsupportedModelError
from nanovllm.models.generation_defaults import FIELDS, FILE, sampling_defaults
from nanovllm.tiny import CHECKPOINT_DIR
from tests.checkpoints import Shape
from tests.engine.cases import said, steps
from tests.small_tokenizers import byte_level, fill, write

KNOWN = {field.name for field in fields(SamplingParams)}
OPTIONS = {"device": "cpu", "max_model_len": 64, "kvcache_block_size": 16}


def put(directory: Path, **values: object) -> Path:
    (directory / FILE).write_text(json.dumps({"eos_token_id": 1, **values}))
    return directory


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"temperature": None, "top_k": None}, {}),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, None),
        ({"temperature": 1, "top_k": 0}, {"temperature": 1.0, "top_k": 0}),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, None),
        ({"max_new_tokens": 2048}, {"max_tokens": 2048}),
        # What vLLM does not take either.
        ({"do_sample": False, "max_length": 20, "seed": 3, "stop_token_ids": [5]}, {}),
        ({"do_sample": "no", "temperature": 0.5}, {"temperature": 0.5}),
    ],
)
def test_the_fields_that_vllm_takes_are_taken(tmp_path, given, expected):
    expected = given if expected is None else expected
    expected = {name: value for name, value in expected.items() if name in KNOWN}
    assert sampling_defaults(put(tmp_path, **given), "auto") == expected
    assert sampling_defaults(tmp_path, "none") == {}
    assert {"temperature", "top_k", "top_p", "max_tokens"} <= KNOWN & set(FIELDS)


def test_no_file_means_no_defaults(tmp_path):
    assert sampling_defaults(tmp_path, "auto") == {}
    assert sampling_defaults(CHECKPOINT_DIR, "auto") == {}


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -1, "a number from 0 to 100"),
        ("temperature", "0.6", "a number from 0 to 100"),
        ("top_k", 1.5, "an integer of at least 0 or -1"),
        ("top_p", 2, "a number above 0 to 1"),
        ("top_p", True, "a number above 0 to 1"),
        ("max_new_tokens", 0, "None or an integer of at least 1"),
    ],
)
def test_a_bad_value_is_refused_by_file_field_and_value(tmp_path, field, value, allowed):
    Shape(layers=1).write(tmp_path)
    put(tmp_path, **{field: value})
    with pytest.raises(UnsupportedModelError) as caught:
        LLM(tmp_path, **OPTIONS)
    error = str(caught.value)
    assert error.startswith(f"{tmp_path / FILE}: {field}={value!r} is not allowed: it must be ")
    assert allowed in error
    LLM(tmp_path, **OPTIONS, generation_config="none").exit()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    Shape(seed=5).write(path)
    write(byte_level(fill(512)), path)
    return put(path, temperature=0, max_new_tokens=5, top_k=1)


def test_they_count_where_a_call_does_not_say(directory):
    prompt = "the stop"
    greedy = SamplingParams(temperature=0, max_tokens=5)
    with LLM(directory, **OPTIONS) as llm:
        (expected,) = llm.generate(prompt, greedy, use_tqdm=False)
        assert len(expected["token_ids"]) == 5
        (output,) = llm.generate(prompt, use_tqdm=False)
        assert said([output]) == said([expected])
        assert said(llm.stream(prompt)) == said([expected])
        (output,) = llm.generate(prompt, max_tokens=3, use_tqdm=False)
        assert output["token_ids"] == expected["token_ids"][:3]
        # Options that are given as a whole are taken as they are.
        longer = SamplingParams(max_tokens=20, ignore_eos=True)
        (output,) = llm.generate(prompt, longer, use_tqdm=False)
        assert len(output["token_ids"]) > 5
        defaults = llm.get_default_sampling_params()
        assert defaults == SamplingParams(temperature=0, max_tokens=5, top_k=1)
        llm.add_request(prompt)
        lines.submit(llm, lines.Line(1, "a", lines.COMPLETIONS, {"prompt": prompt}))
        assert said(steps(llm)) == said([expected]) * 2
    with LLM(Config(str(directory), generation_config="none"), **OPTIONS) as llm:
        (output,) = llm.generate(prompt, temperature=5.0, ignore_eos=True, use_tqdm=False)
        assert len(output["token_ids"]) > 5
        assert 1 in llm.eos_ids  # which are no options of sampling
