"""Checkpoints that are damaged, incomplete or too large stop with an error that names the cause."""

import builtins
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM
from nanovllm.models import UnsupportedModelError
from nanovllm.models.loader import INDEX, WeightsError
from nanovllm.utils.tokenizer import TokenizerError
from tests.broken_checkpoints import SHAPE, SMALL, error_of
from tests.checkpoints import VOCAB, edit_json

PROMPT = [5, 6, 7]
WEIGHTS = "model.safetensors"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
DTYPES = {"I8": torch.int8, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}
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


def run(directory: Path, **options) -> list[int]:
    with LLM(str(directory), **SMALL, **options) as llm:
        (output,) = llm.generate([PROMPT], temperature=0, max_tokens=8, use_tqdm=False)
    return output["token_ids"]


def edit_weights(path: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors."""
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def shard(directory: Path) -> dict[str, str]:
    """Splits the weights into files with an index, as transformers does; returns its map."""
    (directory / WEIGHTS).unlink()
    SHAPE.build().save_pretrained(directory, max_shard_size="40KB")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    return weight_map


def put_index(directory: Path, text: str) -> None:
    """An index in place of the whole file."""
    (directory / WEIGHTS).unlink(missing_ok=True)
    (directory / INDEX).write_text(text)


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "missing tensor 'model.layers.1.mlp.up_proj"),
        ({NORM: None, EMBEDDING: None}, f"missing tensor '{EMBEDDING}' (and 1 more)"),
        ({"lm_head.weight": None}, "missing tensor 'lm_head.weight'"),
        (
            {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)},
            "surplus tensor 'model.layers.7.mlp.up_proj.weight'",
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)},
            "surplus tensor 'model.layers.0.self_attn.q_proj.bias'",
        ),
        *[
            (
                {EMBEDDING: torch.zeros(shape)},
                f"{WEIGHTS}: tensor '{EMBEDDING}' has shape {shape}, expected ({VOCAB}, 32)",
            )
            for shape in [(VOCAB, 31), (VOCAB - 1, 32), (VOCAB,), (VOCAB, 32, 1), ()]
        ],
        *[
            (
                {NORM: torch.ones(32).to(dtype)},
                f"{WEIGHTS}: tensor '{NORM}' has dtype {name}, expected one of F32, BF16, F16",
            )
            for name, dtype in DTYPES.items()
        ],
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_are_not_the_models_are_named(copy, changes, words):
    edit_weights(copy / WEIGHTS, changes)
    message = error_of(copy, WeightsError)
    assert words in message
    assert str(copy) in message


@pytest.mark.parametrize("kept", [0, 5, 100, 2000, -1, None])
def test_a_file_that_is_cut_off_or_rubbish_is_named(copy, kept):
    path = copy / WEIGHTS
    rubbish = b"a pointer to a large file, not the file\n" * 3
    path.write_bytes(rubbish if kept is None else path.read_bytes()[:kept])
    assert f"{path} is truncated or damaged" in error_of(copy, WeightsError)


@pytest.mark.parametrize("others", ["nothing", "a pickle", "shards"])
def test_a_directory_without_weights_is_named(copy, others):
    if others == "shards":
        shard(copy)
        (copy / INDEX).unlink()
    elif others == "a pickle":
        (copy / WEIGHTS).rename(copy / "pytorch_model.bin")
    else:
        (copy / WEIGHTS).unlink()
    message = error_of(copy, FileNotFoundError)
    if others == "nothing":
        assert message == f"{copy} holds no *.safetensors file"
    else:
        assert f"{copy} holds neither {WEIGHTS} nor {INDEX}; '" in message
        assert "is not read" in message


def test_shards_that_disagree_with_each_other_or_the_index_are_named(copy):
    weight_map = shard(copy)
    here = copy / weight_map[NORM]
    other = next(copy / file for file in weight_map.values() if copy / file != here)
    tensors = load_file(other)
    edit_weights(other, {NORM: torch.zeros(32)})
    message = error_of(copy, WeightsError)
    assert f"tensor '{NORM}' is both in" in message
    assert all(str(path) in message for path in (here, other))
    save_file(tensors, other)
    edit_weights(here, {NORM: None})
    assert f"{here} lacks '{NORM}', which {INDEX} says" in error_of(copy, WeightsError)
    here.unlink()
    assert f"{here} is missing" in error_of(copy, WeightsError)
    listed = {name: file for name, file in weight_map.items() if file != here.name}
    (copy / INDEX).write_text(json.dumps({"weight_map": listed}))
    assert "missing tensor" in error_of(copy, WeightsError)


FILE_NAMES = [
    *["../x.safetensors", "/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "..", ""],
    *["x.bin", "\x00.safetensors", 5, None, ["x.safetensors"]],
]


@pytest.mark.parametrize(
    "text",
    [
        *["", "{", "[]", "5", "{}", "\x00", '{"weight_map": null}', '{"weight_map": ["a"]}'],
        *['{"a":' * 100_000, "\ufeff{}"],
        *[json.dumps({"weight_map": {NORM: name}}) for name in FILE_NAMES],
    ],
)
def test_a_bad_index_is_named_and_leads_out_of_no_directory(copy, text):
    shutil.copy(copy / WEIGHTS, copy.parent / "x.safetensors")
    put_index(copy, text)
    assert f"{copy / INDEX} is not a safetensors index" in error_of(copy, WeightsError)


# ------------------------------------------------------------------ config.json


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_directory_without_config_is_named(copy, load_format):
    (copy / "config.json").unlink()
    message = error_of(copy, FileNotFoundError, load_format=load_format)
    assert message == f"{copy} holds no config.json: not a model directory"


def test_dummy_weights_need_config_json_alone_and_do_not_vary(copy):
    for path in copy.iterdir():
        if path.name != "config.json":
            path.unlink()
    with LLM(str(copy), load_format="dummy", **SMALL) as llm:
        (output,) = llm.generate([PROMPT], max_tokens=4, ignore_eos=True, use_tqdm=False)
        assert len(output["token_ids"]) == 4
        assert output["text"] == ""
        assert llm.eos_ids == {1}
    assert run(copy, load_format="dummy") == run(copy, load_format="dummy")


# ------------------------------------------------------------------ code


@pytest.mark.parametrize("model_type", ["qwen3", "unheard_of"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_checkpoint_never_runs(copy, tmp_path, file, model_type):
    """Neither silently nor after a question on standard input, to which a pipe might say yes."""
    trace = tmp_path / "trace"
    (copy / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    (copy / "tokenizer_config.json").write_text("{}")
    edit_json(copy / "config.json", model_type=model_type)
    edit_json(copy / file, auto_map={"AutoConfig": "evil.A", "AutoTokenizer": ["evil.B", "evil.C"]})
    script = f"from nanovllm import LLM; LLM({str(copy)!r}, device='cpu')"
    done = subprocess.run(
        [sys.executable, "-c", script], input="y\ny\n", capture_output=True, text=True, timeout=250
    )
    assert not trace.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    if model_type != "qwen3":
        assert "UnsupportedModelError" in done.stderr
        assert model_type in done.stderr


# ------------------------------------------------------------------ no file


@pytest.mark.parametrize("name", [*CONFIG_FILES, *TOKENIZER_FILES, WEIGHTS, INDEX])
@pytest.mark.parametrize("kind", ["a FIFO", "a directory", "dangling", "no permission", "a loop"])
def test_what_is_no_readable_file_is_named_and_does_not_block(copy, monkeypatch, name, kind):
    path = copy / name
    if name == INDEX:
        put_index(copy, "{}")
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


JSON_FILES = [*CONFIG_FILES, *(name for name in TOKENIZER_FILES if name.endswith(".json"))]
BAD_JSON = ['{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "\ufeff{}", "\x00", "[]"]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("damage", [0, 1, 30, -2, *BAD_JSON])
def test_json_that_is_damaged_is_named(copy, name, damage):
    """Cut off there, or replaced by what the parser does not take."""
    path = copy / name
    path.write_text(damage if isinstance(damage, str) else path.read_text().rstrip()[:damage])
    message = "does not hold a JSON object" if damage == "[]" else "is not valid JSON"
    assert f"{path} {message}" in error_of(copy)


def test_text_in_another_encoding_is_named(copy):
    (copy / "merges.txt").write_bytes(b"\xff\xfe\x00")
    assert f"{copy / 'merges.txt'} is damaged" in error_of(copy, TokenizerError)


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
    edit_json(copy / "config.json", hidden_size=2**22, layer_types=None)
    edit_json(copy / "config.json", **{field: value})
    message = error_of(copy, UnsupportedModelError, load_format=load_format)
    assert f"{field}={value}" in message


@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size", "head_dim"])
def test_sizes_that_are_not_those_of_the_tensors_take_no_memory(copy, field):
    edit_json(copy / "config.json", **{field: 2**30})
    message = error_of(copy, WeightsError)
    assert "model.safetensors" in message
    assert "expected (" in message
    message = error_of(copy, MemoryError, load_format="dummy")
    assert f"{field}={2**30}" in message


@pytest.mark.parametrize("blocks", [10**9, 2**31 - 1])
def test_a_kv_cache_that_does_not_fit_into_memory_is_a_memory_error(copy, blocks):
    assert f"{blocks} blocks" in error_of(copy, MemoryError, num_kvcache_blocks=blocks)


def test_memory_that_the_system_refuses_is_a_memory_error(copy):
    """As under a limit of the process, which the size of the machine does not show."""
    edit_json(copy / "config.json", eos_token_id=None)
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
