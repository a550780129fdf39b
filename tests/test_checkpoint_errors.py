"""Checkpoints: what loads, and what stops with an error that names the cause."""

from __future__ import annotations

import json
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
from nanovllm.utils import hub
from nanovllm.utils.hub import resolve_model
from tests.checkpoints import VOCAB, Shape, edit_config

SHAPE = Shape(layers=2, heads=2, kv_heads=1, hidden=32, intermediate=64)
SMALL = {"device": "cpu", "max_model_len": 64, "kvcache_block_size": 16, "num_kvcache_blocks": 8}
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    SHAPE.write(directory)
    return directory


@pytest.fixture(scope="module")
def tokens(good) -> list[int]:
    """What the good checkpoint says after PROMPT."""
    return run(good)


@pytest.fixture
def copy(good, tmp_path) -> Path:
    """A copy of the good checkpoint, to be spoilt."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def run(directory: Path) -> list[int]:
    with LLM(str(directory), **SMALL) as llm:
        (output,) = llm.generate([PROMPT], temperature=0, max_tokens=8, use_tqdm=False)
    return output["token_ids"]


def error_of(kind: type[Exception], directory: Path | str, **options) -> str:
    with pytest.raises(kind) as caught:
        LLM(str(directory), **SMALL, **options)
    return str(caught.value)


def edit_weights(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replaces, adds or (None) removes tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def shard(directory: Path) -> dict[str, str]:
    """Splits the weights into files with an index, as transformers does; returns its map."""
    (directory / "model.safetensors").unlink()
    SHAPE.build().save_pretrained(directory, max_shard_size="40KB")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    return weight_map


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, ["missing", "layers.1.mlp.up_proj.weight'"]),
        (
            {"model.norm.weight": None, "model.embed_tokens.weight": None},
            ["missing", "'model.embed_tokens.weight'", "1 more"],
        ),
        ({"lm_head.weight": None}, ["missing", "'lm_head.weight'"]),
        (
            {"model.layers.7.mlp.up_proj.weight": torch.zeros(2)},
            ["surplus", "'model.layers.7.mlp.up_proj.weight'"],
        ),
        (
            {"model.layers.0.self_attn.q_proj.bias": torch.zeros(128)},
            ["surplus", "'model.layers.0.self_attn.q_proj.bias'"],
        ),
    ],
    ids=["missing", "two missing", "no output head", "surplus", "a bias that the config denies"],
)
def test_missing_and_surplus_tensors_are_named(copy, changes, words):
    edit_weights(copy, changes)
    message = error_of(WeightsError, copy)
    assert [word for word in [str(copy), *words] if word not in message] == []


@pytest.mark.parametrize("shape", [(VOCAB, 31), (VOCAB - 1, 32), (VOCAB,), (VOCAB, 32, 1), ()])
def test_a_misshaped_tensor_is_named_with_both_shapes(copy, shape):
    edit_weights(copy, {"model.embed_tokens.weight": torch.zeros(shape)})
    message = error_of(WeightsError, copy)
    assert f"tensor 'model.embed_tokens.weight' has shape {shape}" in message
    assert message.endswith(f"expected ({VOCAB}, 32)")
    assert "model.safetensors" in message


@pytest.mark.parametrize("kept", [0, 5, 100, 2000, -1])
def test_a_truncated_file_is_named(copy, kept):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path} is truncated or damaged" in error_of(WeightsError, copy)


def test_a_file_of_rubbish_is_named(copy):
    path = copy / "model.safetensors"
    path.write_bytes(b"a pointer to a large file, not the file\n" * 3)
    assert f"{path} is truncated or damaged" in error_of(WeightsError, copy)


def test_a_directory_without_weights_is_named(copy):
    (copy / "model.safetensors").unlink()
    message = error_of(FileNotFoundError, copy)
    assert str(copy) in message
    assert "safetensors" in message


def test_a_tensor_in_two_shards_is_named_with_both(copy):
    weight_map = shard(copy)
    files = sorted(set(weight_map.values()))
    here = weight_map["model.norm.weight"]
    other = next(file for file in files if file != here)
    tensors = load_file(copy / other) | {"model.norm.weight": torch.zeros(32)}
    save_file(tensors, copy / other)
    message = error_of(WeightsError, copy)
    assert "'model.norm.weight'" in message
    assert str(copy / here) in message
    assert str(copy / other) in message


def test_files_beside_the_weights_are_ignored(copy, tokens):
    save_file({"model.norm.weight": torch.zeros(32)}, copy / "old.safetensors")
    save_file({"lora_A": torch.zeros(32)}, copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text("rubbish")
    (copy / "pytorch_model.bin").write_bytes(b"rubbish")
    (copy / "original").mkdir()
    assert run(copy) == tokens


def test_a_missing_shard_is_named(copy):
    last = sorted(set(shard(copy).values()))[-1]
    (copy / last).unlink()
    assert f"{copy / last} is missing" in error_of(WeightsError, copy)


def test_a_truncated_shard_is_named(copy):
    path = copy / sorted(set(shard(copy).values()))[1]
    path.write_bytes(path.read_bytes()[:-9])
    assert f"{path} is truncated or damaged" in error_of(WeightsError, copy)


def test_a_tensor_that_the_index_promises_in_vain_is_named(copy):
    weight_map = shard(copy)
    file = weight_map["model.norm.weight"]
    tensors = load_file(copy / file)
    del tensors["model.norm.weight"]
    save_file(tensors, copy / file)
    message = error_of(WeightsError, copy)
    assert [word for word in (str(copy / file), "'model.norm.weight'", INDEX)
            if word not in message] == []  # fmt: skip


def test_a_file_that_the_index_omits_is_missing(copy):
    weight_map = shard(copy)
    omitted = weight_map["model.norm.weight"]
    weight_map = {name: file for name, file in weight_map.items() if file != omitted}
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "missing tensor" in error_of(WeightsError, copy)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"model.norm.weight": 5}}',
        "\x00",
    ],
)
def test_a_bad_index_is_named(copy, text):
    shard(copy)
    (copy / INDEX).write_text(text)
    assert f"{copy / INDEX} is not a safetensors index" in error_of(WeightsError, copy)


# ------------------------------------------------------------------ config.json


def test_a_model_that_is_not_supported_is_refused_by_name(copy):
    edit_config(copy, hidden_act="gelu")
    assert "hidden_act='gelu'" in error_of(UnsupportedModelError, copy)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_no_object_is_named(copy, name):
    (copy / name).write_text("[]")
    message = error_of(UnsupportedModelError, copy)
    assert str(copy / name) in message
    assert "JSON object" in message


def test_a_directory_without_config_is_named(copy):
    (copy / "config.json").unlink()
    message = error_of(FileNotFoundError, copy)
    assert str(copy) in message
    assert "config.json" in message


def test_dummy_weights_need_config_json_alone(copy):
    for path in copy.iterdir():
        if path.name != "config.json":
            path.unlink()
    with LLM(str(copy), load_format="dummy", **SMALL) as llm:
        (output,) = llm.generate([PROMPT], max_tokens=4, ignore_eos=True, use_tqdm=False)
        assert len(output["token_ids"]) == 4
        assert output["text"] == ""
        assert llm.eos_ids == {1}


def test_dummy_weights_do_not_vary(copy):
    def run():
        with LLM(str(copy), load_format="dummy", **SMALL) as llm:
            return llm.generate([PROMPT], temperature=0, max_tokens=8, use_tqdm=False)

    assert run() == run()


def test_dummy_weights_still_need_config_json(copy):
    (copy / "config.json").unlink()
    assert "config.json" in error_of(FileNotFoundError, copy, load_format="dummy")


# ------------------------------------------------------------------ code


@pytest.mark.parametrize("model_type", ["qwen3", "unheard_of"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_checkpoint_never_runs(copy, tmp_path, file, model_type):
    """Neither silently nor after a question on standard input, to which a pipe might say yes."""
    trace = tmp_path / "trace"
    (copy / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "evil.A", "AutoTokenizer": ["evil.B", "evil.C"]}
    fields = json.loads((copy / "config.json").read_text()) | {"model_type": model_type}
    (copy / "config.json").write_text(json.dumps(fields))
    (copy / "tokenizer_config.json").write_text("{}")
    fields = json.loads((copy / file).read_text()) | {"auto_map": auto_map}
    (copy / file).write_text(json.dumps(fields))
    script = f"from nanovllm import LLM; LLM({str(copy)!r}, device='cpu')"
    done = subprocess.run(
        [sys.executable, "-c", script], input="y\ny\n", capture_output=True, text=True, timeout=120
    )
    assert not trace.exists()
    assert "[y/N]" not in done.stdout + done.stderr
    if model_type != "qwen3":
        assert "UnsupportedModelError" in done.stderr
        assert model_type in done.stderr


# ------------------------------------------------------------------ the hub


def test_a_hub_id_offline_says_so():
    message = error_of(FileNotFoundError, "nobody/no-such-model")
    words = ["model='nobody/no-such-model'", "hub cache", "offline", "download", "a directory"]
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("name", ["no such model", "a/b/c", "/no/such/directory", "-x-", "a--b"])
def test_a_nonsense_name_is_neither_directory_nor_hub_id(name):
    message = error_of(FileNotFoundError, name)
    assert message.startswith(f"model={name!r} is neither a directory nor a model on the hub")


def test_a_model_that_the_hub_does_not_have_is_named(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    class NotFoundError(RepositoryNotFoundError):
        def __init__(self):
            pass

    def absent(*args, **kwargs):
        raise NotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(FileNotFoundError, match=r"^model='somebody/typo' .* model on the hub"):
        resolve_model("somebody/typo")


def test_only_the_files_of_a_model_are_downloaded(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def download(model, **options):
        asked.update(options, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen3-0.6B") == tmp_path
    assert asked == {"model": "Qwen/Qwen3-0.6B", "allow_patterns": hub.PATTERNS}


def test_a_directory_may_begin_with_a_tilde(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == tmp_path / "model"
