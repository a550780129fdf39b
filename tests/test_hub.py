"""A model's name: a directory, or an id on the Hugging Face hub, which errors name."""

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from nanovllm.utils.hub import resolve_model
from tests.broken_checkpoints import error_of


def test_a_hub_id_offline_says_so():
    message = error_of("nobody/no-such-model", FileNotFoundError)
    words = ["model='nobody/no-such-model'", "hub cache", "offline", "download", "a directory"]
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("name", ["no such model", "a/b/c", "/no/such/directory", "-x-", "a--b"])
def test_a_nonsense_name_is_neither_directory_nor_hub_id(name):
    message = error_of(name, FileNotFoundError)
    assert message.startswith(f"model={name!r} is neither a directory nor a model on the hub")
    for refused in ("x" * 300, "~nobody-of-that-name/x"):  # by the system
        with pytest.raises(FileNotFoundError, match="model="):
            resolve_model(refused)


def test_a_model_that_the_hub_does_not_have_is_named(monkeypatch):
    class NotFoundError(RepositoryNotFoundError):
        def __init__(self):
            pass

    def absent(*args, **kwargs):
        raise NotFoundError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(FileNotFoundError, match=r"^model='somebody/typo' .* model on the hub"):
        resolve_model("somebody/typo")


def test_only_the_files_of_a_model_are_downloaded(monkeypatch, tmp_path):
    read = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
    ]
    others = ["README.md", "pytorch_model.bin", "checkpoint-500/model.safetensors", "run.py"]
    found = []

    def download(model, **options):
        assert model == "Qwen/Qwen3-0.6B"
        found.extend(filter_repo_objects(read + others, **options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("Qwen/Qwen3-0.6B") == tmp_path
    assert found == read


def test_a_directory_may_begin_with_a_tilde(monkeypatch, tmp_path):
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/model") == tmp_path / "model"
