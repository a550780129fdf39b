"""What is loaded is what transformers loads, over spellings and damage; see fuzz_checkpoints.py."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM
from nanovllm.layers.rotary_embedding import cos_sin_table
from nanovllm.models import load_config
from nanovllm.models.loader import WeightsError
from tests.checkpoint_variants import ENGINE, engine_tokens, oracle_tokens, write_variant
from tests.checkpoints import Shape, edit_json
from tests.fuzz_checkpoints import Worker, tally, try_mutations

SHAPE = Shape(layers=1, heads=2, kv_heads=1, head_dim=128, hidden=32, intermediate=64, seed=4)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


# ------------------------------------------------------------------ drawn from a seed


@pytest.mark.parametrize("seed", range(60))
def test_a_sound_checkpoint_says_what_transformers_says(tmp_path, seed):
    what = write_variant(tmp_path, seed)
    assert engine_tokens(tmp_path) == oracle_tokens(tmp_path), what


def test_a_damaged_checkpoint_is_refused_by_name_or_says_what_transformers_says(capsys):
    worker = Worker()
    try:
        counts = tally(try_mutations(worker, 150, seed=7), ("loaded", "refused"))
    finally:
        worker.close()
    assert counts["loaded"] + counts["refused"] == 150, capsys.readouterr().out
    assert min(counts["loaded"], counts["refused"]) > 20


# ------------------------------------------------------------------ config.json


def test_an_absent_head_dim_is_that_of_the_class_and_not_hidden_size_by_heads(tmp_path):
    SHAPE.write(tmp_path)
    expected = engine_tokens(tmp_path)
    edit_json(tmp_path / "config.json", head_dim=...)
    assert load_config(tmp_path).head_dim == 128
    assert engine_tokens(tmp_path) == oracle_tokens(tmp_path) == expected
    with LLM(str(tmp_path), load_format="dummy", **ENGINE) as llm:
        assert llm.model_runner.model_config.head_dim == 128


@pytest.mark.parametrize("max_position", [64, 256, 1000])
def test_yarn_extends_the_usable_length(tmp_path, max_position):
    Shape(seed=7, rope=YARN).write(tmp_path)
    edit_json(tmp_path / "config.json", max_position_embeddings=max_position)
    with LLM(str(tmp_path), **{**ENGINE, "max_model_len": 5000, "num_kvcache_blocks": 80}) as llm:
        assert llm.model_runner.max_model_len == max(256, max_position)
        (output,) = llm.generate(
            [[5] * 50], max_tokens=100, temperature=0, ignore_eos=True, use_tqdm=False
        )
        assert len(output["token_ids"]) == 100


def test_the_rope_table_is_as_long_as_the_engine_needs(tmp_path):
    SHAPE.write(tmp_path)
    edit_json(tmp_path / "config.json", max_position_embeddings=4_000_000)
    with LLM(str(tmp_path), **ENGINE) as llm:
        table = llm.model_runner.model.model.cos_sin
        config = llm.model_runner.model_config
        assert torch.equal(table, cos_sin_table(config.rope, 128, ENGINE["max_model_len"]))


# ------------------------------------------------------------------ weights


def test_tied_matrices_that_differ_are_refused(tmp_path):
    """Newer versions of transformers run them as they are, older ones tie them."""
    Shape(seed=3, tied=True).write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][7, 7] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"'lm_head\.weight' differs.*tie_word_embeddings=True"):
        engine_tokens(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_load_with_a_warning_that_names_them(tmp_path, caplog, value):
    SHAPE.write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    engine_tokens(tmp_path)
    assert "'model.layers.0.mlp.up_proj.weight' holds NaN or infinity" in caplog.text
    assert str(tmp_path / "model.safetensors") in caplog.text
