"""Tokenizers that are damaged, halved or name files elsewhere stop with an error that says so."""

import pytest

from nanovllm.tiny import CHECKPOINT_DIR
from nanovllm.utils.json_files import naming
from nanovllm.utils.tokenizer import TokenizerError, load_tokenizer
from tests.broken_checkpoints import SHAPE, error_of
from tests.checkpoint_mutations import add_tokenizer
from tests.checkpoints import edit_json


@pytest.mark.parametrize(
    "field",
    ["vocab_file", "tokenizer_file", "gguf_file", "fast_tokenizer_files", "vocab", "merges"],
)
@pytest.mark.parametrize("value", ["/etc/passwd", "../x", "x", "\x00"])
def test_a_tokenizer_that_names_files_elsewhere_is_refused(copy, field, value):
    path = copy / "tokenizer_config.json"
    edit_json(path, **{field: value})
    message = error_of(copy, TokenizerError)
    assert f"{path}: {field}={value!r}" in message


def test_a_tokenizer_may_name_its_own_files(copy):
    named = {"vocab_file": "vocab.json", "tokenizer_file": None, "init_inputs": []}
    named |= {"special_tokens_map_file": "/home/somebody/special_tokens_map.json"}
    edit_json(copy / "tokenizer_config.json", **named)
    assert load_tokenizer(copy).encode("Once upon a time")


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_refused(copy, missing):
    """transformers would take the missing half for an empty one."""
    add_tokenizer(copy, fast=False)
    assert load_tokenizer(copy).encode("Once upon a time")
    (copy / missing).unlink()
    assert f"{copy / missing} is missing" in error_of(copy, TokenizerError)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}),
        ("tokenizer.json", {"model": {"type": "Nonsense"}}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"tokenizer_class": 5}),
        ("tokenizer_config.json", {"eos_token": {"a": 1}}),
        ("tokenizer_config.json", {"model_max_length": "long"}),
    ],
    ids=str,
)
def test_errors_of_the_library_name_the_tokenizer(copy, name, changes):
    edit_json(copy / name, **changes)
    message = error_of(copy, TokenizerError)
    assert str(copy) in message
    assert name in message


def test_a_checkpoint_without_tokenizer_has_none(tmp_path):
    SHAPE.write(tmp_path)
    assert load_tokenizer(tmp_path) is None
    assert load_tokenizer(CHECKPOINT_DIR) is not None


class PanicException(BaseException):
    """Named as the one of pyo3, which cannot be imported."""


@pytest.mark.parametrize("raised", [RecursionError, OSError, KeyError, PanicException])
def test_what_a_library_raises_becomes_a_named_error(raised):
    with (
        pytest.raises(TokenizerError, match=r"the file: .*the cause"),
        naming("the file", TokenizerError),
    ):
        raise raised("the cause")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit, MemoryError, GeneratorExit])
def test_what_ends_a_program_passes(raised):
    with pytest.raises(raised), naming("the file", TokenizerError):
        raise raised
