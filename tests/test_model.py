"""Decoders of every architecture against transformers, and stage by stage against their whole."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.models import architectures
from nanovllm.models.architectures import ARCHITECTURES, Architecture
from nanovllm.models.throwaway_cache import sequence_starts, throwaway_cache
from nanovllm.utils.options import NONE
from tests.checkpoints import TABLE, Shape, greedy, prompts
from tests.decode_cases import Sequences, run

SHAPE = Shape(layers=3, hidden=48, intermediate=80, head_dim=16)
LENGTHS = [30, 21, 40, 64]
# Sequences that decode, then sequences of which a chunk is computed, with its begin and end.
STEPS = [
    ([], [(0, 0, 17), (1, 0, 20)]),
    ([], [(0, 17, 28), (2, 0, 5)]),
    ([(0, 28, 29), (1, 20, 21)], []),
    ([(0, 29, 30)], [(2, 5, 39), (3, 0, 33)]),
    ([(2, 39, 40), (3, 33, 34)], []),
]
SEEDS = pytest.mark.parametrize("seed", range(12))


def random_shape(seed: int) -> Shape:
    return Shape.random(seed, list(TABLE)[seed % len(TABLE)])


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ against transformers


@torch.inference_mode()
@SEEDS
def test_logits_of_whole_sequences_are_those_of_transformers(seed):
    lengths = [7, 1, 40, 90]
    pair = Sequences(random_shape(seed), lengths)
    logits = pair.model.compute_logits(pair.model(*pair.whole()))
    close(logits, pair.expected([(n, 0, length) for n, length in enumerate(lengths)]))


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("model_type", TABLE)
def test_logits_of_steps_are_those_of_transformers(model_type, tied):
    """Prompts in chunks, tokens one by one, and steps in which some do one, some the other."""
    pair = Sequences(replace(SHAPE, model_type=model_type, tied=tied, seed=tied), LENGTHS)
    for step in STEPS:
        logits = pair.model.compute_logits(run(pair.model, pair.inputs(*step)))
        close(logits, pair.expected(*step))


@pytest.mark.parametrize("model_type", TABLE)
def test_a_checkpoint_of_another_architecture_would_not_load(model_type):
    """A model's weights are those that transformers has, biases and norms included."""
    pair = Sequences(replace(SHAPE, model_type=model_type, tied=True), [1])
    assert pair.model.weight_shards().keys() == pair.oracle.state_dict().keys() - {"lm_head.weight"}


def test_a_new_architecture_is_an_entry_of_the_table(tmp_path, monkeypatch):
    """Mistral, without its sliding window."""
    mistral = Architecture(
        name="MistralForCausalLM",
        model_type="mistral",
        ropes=("default",),
        qkv_bias=False,
        o_bias=False,
        own_fields={"sliding_window": (NONE, 4096)},
    )
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*ARCHITECTURES, mistral))
    oracle = replace(SHAPE, model_type="mistral", more={"sliding_window": None}).write(tmp_path)
    given = prompts(0, count=4)
    with LLM(str(tmp_path), device="cpu", max_model_len=128) as llm:
        outputs = llm.generate(given, temperature=0, max_tokens=12, use_tqdm=False)
    for prompt, output in zip(given, outputs, strict=True):
        assert output["token_ids"] == greedy(oracle, prompt, 12)


# ------------------------------------------------------------------ stages


def test_stages_come_in_the_order_of_execution():
    order = [(stage.layer, stage.name) for stage in Sequences(SHAPE, [1]).model.stages()]
    kinds = ["qkv", "attention", "mlp"]
    assert order == [(-1, "mlp"), *((layer, kind) for layer in range(3) for kind in kinds)]


@torch.inference_mode()
@SEEDS
def test_layers_in_two_calls_equal_the_whole_to_the_last_bit(seed):
    pair = Sequences(random_shape(seed), LENGTHS)
    model = pair.model

    def in_two_calls(ids, positions, metadata=None):
        hidden = ids
        for layer in range(model.config.num_hidden_layers):
            hidden, residual = model.forward_attention(hidden, positions, layer, metadata)
            hidden = model.forward_ffn(hidden, residual, layer)
        return hidden

    assert torch.equal(in_two_calls(*pair.whole()), model(*pair.whole()))
    results = []
    for either in (model, in_two_calls):
        pair.cache.zero_()
        hidden = [run(either, pair.inputs(*step)) for step in STEPS]
        results.append([*hidden, pair.cache.clone()])
    assert all(map(torch.equal, *results))


# ------------------------------------------------------------------ whole sequences, no cache


@torch.inference_mode()
def test_a_throwaway_cache_leaves_the_bound_one_as_it_was():
    pair = Sequences(SHAPE, LENGTHS)
    model, whole = pair.model, pair.whole()
    alone = model(*whole)
    before = pair.cache.normal_().clone()
    assert torch.equal(model(*whole), alone)
    with pytest.raises(KeyboardInterrupt), throwaway_cache(model, whole[1]):
        raise KeyboardInterrupt
    assert torch.equal(pair.cache, before)
    assert model.kv_cache is pair.cache
    assert model.model.layers[1].self_attn.kv_cache[0].data_ptr() == pair.cache[1, 0].data_ptr()


@pytest.mark.parametrize(
    ("positions", "starts"),
    [
        ([0, 1, 2], [0, 3]),
        ([0, 1, 0, 0, 1, 2], [0, 2, 3, 6]),
        ([0], [0, 1]),
        ([0, 0], [0, 1, 2]),
    ],
)
def test_each_position_0_begins_a_sequence(positions, starts):
    assert sequence_starts(torch.tensor(positions)).tolist() == starts


@pytest.mark.parametrize("positions", [[], [1], [5, 6, 0, 1], [0, 2], [0, 1, 1], [[0, 1]], 0])
def test_whole_sequences_count_up_from_0(positions):
    with pytest.raises(ValueError, match=r"^positions must count up from 0 in each sequence"):
        sequence_starts(torch.tensor(positions, dtype=torch.int64))


@torch.inference_mode()
def test_positions_that_the_rope_table_lacks_are_refused():
    """On a GPU they would be read from beyond it."""
    model = Sequences(SHAPE, [1]).model
    model.allocate(torch.device("cpu"), max_length=8)
    ids, positions = torch.arange(12), torch.tensor([*range(3), *range(9)])
    model(ids[:11], positions[:11])
    for call in (model, model.forward_attention, PipelineScheduler(model).decode_token):
        with pytest.raises(ValueError, match=r"^positions up to 8 are not allowed.* below 8,"):
            call(ids, positions)


# ------------------------------------------------------------------ imports


def test_an_engine_with_dummy_weights_on_the_cpu_needs_neither_triton_nor_transformers(tmp_path):
    Shape(layers=1).config().save_pretrained(tmp_path)
    code = f"""
import sys
from nanovllm import LLM, Config, LLMEngine, SamplingParams
assert not {{"triton", "transformers"}} & sys.modules.keys(), "imported by nanovllm"
llm = LLM({str(tmp_path)!r}, device="cpu", load_format="dummy", max_model_len=32)
assert llm.generate([[1, 2]], max_tokens=2, use_tqdm=False)[0]["token_ids"]
assert not {{"triton", "transformers"}} & sys.modules.keys(), "imported by an engine"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
