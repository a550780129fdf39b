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

NOT_FOUND = "a directory nor a model on the hub that you may read"


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


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replaces, adds or (None) removes tensors; `__` stands for a dot."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


def shard(directory: Path) -> dict[str, str]:
    """Splits the weights into files with an index, as transformers does; returns its map."""
    (directory / "model.safetensors").unlink()
    SHAPE.build().save_pretrained(directory, max_shard_size="40KB")
    weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    return weight_map


# ------------------------------------------------------------------ weights


def test_a_missing_tensor_is_named(copy):
    edit_weights(copy, model__layers__1__mlp__up_proj__weight=None)
    message = error_of(WeightsError, copy)
    assert message == f"{copy}: missing tensor 'model.layers.1.mlp.up_proj.weight'"


def test_of_several_missing_tensors_one_is_named_and_the_rest_counted(copy):
    edit_weights(copy, model__norm__weight=None, model__embed_tokens__weight=None)
    message = error_of(WeightsError, copy)
    assert message.endswith("missing tensor 'model.embed_tokens.weight' (and 1 more)")


def test_a_surplus_tensor_is_named(copy):
    edit_weights(copy, model__layers__7__mlp__up_proj__weight=torch.zeros(2))
    message = error_of(WeightsError, copy)
    assert message == f"{copy}: surplus tensor 'model.layers.7.mlp.up_proj.weight'"


def test_biases_that_the_config_does_not_know_are_surplus(copy):
    edit_weights(copy, model__layers__0__self_attn__q_proj__bias=torch.zeros(128))
    assert "surplus tensor 'model.layers.0.self_attn.q_proj.bias'" in error_of(WeightsError, copy)


@pytest.mark.parametrize("shape", [(VOCAB, 31), (VOCAB - 1, 32), (VOCAB,), (VOCAB, 32, 1), ()])
def test_a_misshaped_tensor_is_named_with_both_shapes(copy, shape):
    edit_weights(copy, model__embed_tokens__weight=torch.zeros(shape))
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
    assert error_of(FileNotFoundError, copy) == f"{copy} holds no *.safetensors file"


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


def test_a_sharded_checkpoint_loads(copy, tokens):
    shard(copy)
    assert run(copy) == tokens


def test_a_missing_shard_is_named(copy):
    last = sorted(set(shard(copy).values()))[-1]
    (copy / last).unlink()
    assert error_of(WeightsError, copy) == f"{copy / last} is missing"


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
    assert message == f"{copy / file} lacks 'model.norm.weight', which {INDEX} says it holds"


def test_a_tensor_that_the_index_omits_is_found_in_a_file_that_it_names(copy, tokens):
    """As in transformers, which reads those files whole."""
    weight_map = shard(copy)
    file = weight_map.pop("model.norm.weight")
    assert file in weight_map.values()
    (copy / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert run(copy) == tokens


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


def test_a_tied_checkpoint_that_repeats_the_output_head_loads(tmp_path):
    shape = Shape(layers=1, heads=2, kv_heads=1, hidden=32, intermediate=64, tied=True)
    shape.write(tmp_path)
    expected = run(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, lm_head__weight=embedding.clone())
    assert run(tmp_path) == expected


def test_rope_frequencies_of_old_checkpoints_are_ignored(copy, tokens):
    edit_weights(copy, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(32))
    assert run(copy) == tokens


def test_an_untied_checkpoint_needs_its_output_head(copy):
    edit_weights(copy, lm_head__weight=None)
    assert "missing tensor 'lm_head.weight'" in error_of(WeightsError, copy)


# ------------------------------------------------------------------ config.json


def test_a_model_that_is_not_supported_is_refused_by_name(copy):
    edit_config(copy, hidden_act="gelu")
    assert "hidden_act='gelu'" in error_of(UnsupportedModelError, copy)


@pytest.mark.parametrize("text", ["", "{", "nonsense", '{"model_type": "qwen3",}', "\xff\xfe"])
def test_broken_json_is_named(copy, text):
    path = copy / "config.json"
    path.write_bytes(text.encode("latin-1"))
    assert f"{path} is not valid JSON" in error_of(UnsupportedModelError, copy)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_no_object_is_named(copy, name):
    (copy / name).write_text("[]")
    assert error_of(UnsupportedModelError, copy) == f"{copy / name} does not hold a JSON object"


def test_a_directory_without_config_is_named(copy):
    (copy / "config.json").unlink()
    message = error_of(FileNotFoundError, copy)
    assert message == f"{copy} holds no config.json: not a model directory"


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
    assert "holds no config.json" in error_of(FileNotFoundError, copy, load_format="dummy")


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
    assert message == (
        "model='nobody/no-such-model' is not a directory, is not in the local hub cache, and the "
        "hub cannot be reached (offline): download it first, or give a directory"
    )


@pytest.mark.parametrize("name", ["no such model", "a/b/c", "/no/such/directory", "-x-", "a--b"])
def test_a_nonsense_name_is_neither_directory_nor_hub_id(name):
    message = error_of(FileNotFoundError, name)
    assert (
        message == f"model={name!r} is neither a directory nor a model on the hub that you may read"
    )


def test_a_model_that_the_hub_does_not_have_is_named(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    class NotFoundError(RepositoryNotFoundError):
        def __init__(self):
            pass

    def absent(*args, **kwargs):
        raise NotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(FileNotFoundError) as caught:
        resolve_model("somebody/typo")
    assert (
        str(caught.value)
        == "model='somebody/typo' is neither a directory nor a model on the hub that you may read"
    )


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
