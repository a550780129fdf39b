"""Files of a checkpoint that are damaged, missing or no files, and sizes that no machine has."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import subprocess
import sys

import pytest

from nanovllm import LLM
from nanovllm.models import UnsupportedModelError
from nanovllm.models.loader import INDEX, WeightsError
from nanovllm.tiny import CHECKPOINT_DIR
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.json_files import naming
from nanovllm.utils.tokenizer import TokenizerError, load_tokenizer
from tests.checkpoint_mutations import add_tokenizer
from tests.checkpoints import Shape, edit_config

SMALL = {"device": "cpu", "max_model_len": 64, "kvcache_block_size": 16, "num_kvcache_blocks": 8}
SHAPE = Shape(layers=1, heads=2, kv_heads=1, hidden=32, intermediate=64)
CONFIG_FILES = ["config.json", "generation_config.json"]
TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
]
WEIGHT_FILES = ["model.safetensors", INDEX]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint with every file that is read, the index aside."""
    directory = tmp_path_factory.mktemp("good")
    SHAPE.write(directory)
    add_tokenizer(directory, always("tokenizer.json"))
    return directory


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def always(kept: str):
    """A stand-in for a random generator, by which `add_tokenizer` keeps that file."""

    class Kept:
        def random(self) -> float:
            return 1.0 if kept == "tokenizer.json" else 0.0

    return Kept()


def error_of(directory, kind: type[BaseException] = ValueError, **options) -> str:
    with pytest.raises(kind) as caught:
        LLM(str(directory), **SMALL, **options)
    return str(caught.value)


def put_index(directory, weight_map) -> None:
    """An index in place of the whole file."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# ------------------------------------------------------------------ no file


@pytest.mark.parametrize("name", [*CONFIG_FILES, *TOKENIZER_FILES, *WEIGHT_FILES])
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "dangling", "no permission", "a loop"])
def test_what_is_no_readable_file_is_named_and_does_not_block(copy, monkeypatch, name, kind):
    path = copy / name
    if name == INDEX:
        put_index(copy, {})
    if kind != "no permission":
        path.unlink()
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
        kind = "is missing"
    elif kind == "a loop":
        path.symlink_to(name)
        kind = "cannot be read"
    else:
        forbid(monkeypatch, path)
    message = error_of(copy)
    assert str(path) in message
    assert kind in message


def forbid(monkeypatch, path) -> None:
    """As if this user might not read it; root may read everything."""
    really_open = builtins.open

    def opened(file, *args, **options):
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(file))
        return really_open(file, *args, **options)

    monkeypatch.setattr(builtins, "open", opened)


@pytest.mark.parametrize("kept", [0, 1, 30, -2])
@pytest.mark.parametrize(
    "name", [*CONFIG_FILES, *(name for name in TOKENIZER_FILES if name.endswith(".json"))]
)
def test_json_that_is_cut_off_is_named(copy, name, kept):
    path = copy / name
    path.write_text(path.read_text().rstrip()[:kept])
    assert f"{path} is not valid JSON" in error_of(copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "added_tokens.json", INDEX])
@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", "[]", "\x00"]
)
def test_json_that_the_parser_cannot_take_is_named(copy, name, text):
    if name == INDEX:
        put_index(copy, {})
    (copy / name).write_text(text)
    assert str(copy / name) in error_of(copy)


def test_text_in_another_encoding_is_named(copy):
    (copy / "merges.txt").write_bytes(b"\xff\xfe\x00")
    assert f"{copy / 'merges.txt'} is damaged" in error_of(copy, TokenizerError)


# ------------------------------------------------------------------ paths


@pytest.mark.parametrize(
    "name",
    [
        *["../x.safetensors", "/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", ""],
        *["x.bin", "\x00.safetensors", 5, None, ["x.safetensors"]],
    ],
)
def test_an_index_names_safetensors_files_of_its_directory_alone(copy, name):
    shutil.copy(copy / "model.safetensors", copy.parent / "x.safetensors")
    put_index(copy, {"model.norm.weight": name})
    message = error_of(copy, WeightsError)
    assert f"{copy / INDEX} is not a safetensors index" in message
    assert repr(name) in message


@pytest.mark.parametrize(
    "field",
    ["vocab_file", "tokenizer_file", "gguf_file", "fast_tokenizer_files", "vocab", "merges"],
)
@pytest.mark.parametrize("value", ["/etc/passwd", "../x", "x", "\x00"])
def test_a_tokenizer_that_names_files_elsewhere_is_refused(copy, field, value):
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    message = error_of(copy, TokenizerError)
    assert f"{path}: {field}={value!r}" in message


def test_a_tokenizer_may_name_its_own_files(copy):
    path = copy / "tokenizer_config.json"
    named = {"vocab_file": "vocab.json", "tokenizer_file": None, "init_inputs": []}
    named |= {"special_tokens_map_file": "/home/somebody/special_tokens_map.json"}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    assert load_tokenizer(copy).encode("Once upon a time")


def test_links_as_in_the_cache_of_the_hub_are_followed(copy):
    blobs = copy.parent / "blobs"
    blobs.mkdir()
    for i, path in enumerate(sorted(copy.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(os.path.join("..", "blobs", str(i)))
    with LLM(str(copy), **SMALL) as llm:
        assert llm.tokenizer is not None


def test_pickles_are_named_and_not_read(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    message = error_of(copy, FileNotFoundError)
    assert "'pytorch_model.bin' is not read" in message


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-that-name/x"])
def test_a_name_that_the_system_refuses_is_not_found(name):
    with pytest.raises(FileNotFoundError, match="model="):
        resolve_model(name)


# ------------------------------------------------------------------ the tokenizer


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt"])
def test_half_a_tokenizer_is_refused(copy, missing):
    """transformers would take the missing half for an empty one."""
    add_tokenizer(copy, always("vocab.json"))
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
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
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


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 2**31),
        ("num_hidden_layers", 10_000),
        ("hidden_size", 2**40),
        ("intermediate_size", 2**31 - 1),
        ("num_attention_heads", 10**30),
    ],
)
def test_sizes_that_no_machine_has_are_refused_by_name(copy, field, value, load_format):
    edit_config(copy, hidden_size=2**22, layer_types=None)
    edit_config(copy, **{field: value})
    message = error_of(copy, UnsupportedModelError, load_format=load_format)
    assert f"{field}={value}" in message


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size", "head_dim"])
def test_sizes_that_are_not_those_of_the_tensors_take_no_memory(copy, field):
    edit_config(copy, **{field: 2**30})
    message = error_of(copy, WeightsError)
    assert "model.safetensors" in message
    assert "expected (" in message
    message = error_of(copy, MemoryError, load_format="dummy")
    assert f"{field}={2**30}" in message


@pytest.mark.parametrize("blocks", [10**9, 10**15])
def test_a_kv_cache_that_does_not_fit_into_memory_is_a_memory_error(copy, blocks):
    with pytest.raises(MemoryError, match=f"{blocks} blocks"):
        LLM(str(copy), **{**SMALL, "num_kvcache_blocks": blocks})


def test_memory_that_the_system_refuses_is_a_memory_error(copy):
    """As under a limit of the process, which the size of the machine does not show."""
    edit_config(copy, eos_token_id=None)
    code = f"""
import resource
from nanovllm import LLM
options = {SMALL!r} | {{"model": {str(copy)!r}, "load_format": "dummy"}}
LLM(**options).exit()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27,) * 2)
try:
    LLM(**(options | {{"num_kvcache_blocks": 2**14}}))
except MemoryError as error:
    print(error)
config = {str(copy / "config.json")!r}
text = open(config).read().replace('"vocab_size": 512', '"vocab_size": 4000000')
open(config, "w").write(text)
try:
    LLM(**options)
except MemoryError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kv_cache, weights = done.stdout.splitlines()
    assert "the KV cache (16384 blocks" in kv_cache
    assert "vocab_size=4000000" in weights


def test_more_layers_than_there_are_tensors_are_missing(copy):
    edit_config(copy, num_hidden_layers=900, layer_types=None)
    assert "missing tensor 'model.layers.1." in error_of(copy, WeightsError)
