"""The model against transformers, stage by stage against its whole, and what an import costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.layers.attention import AttentionMetadata, DecodeMetadata, PrefillMetadata
from nanovllm.layers.attention_torch import TorchBackend
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models import Checkpoint, Model, load_config, load_model
from nanovllm.models.throwaway_cache import sequence_starts, throwaway_cache
from tests.checkpoints import TABLE, VOCAB, Shape

CPU = torch.device("cpu")
BLOCK = 16
SEEDS = range(12)
KINDS = list(TABLE)


def load(directory) -> Model:
    config = load_config(directory)
    group = ParallelGroup()
    backend = TorchBackend(config.rank_heads(group))
    return load_model(config, Checkpoint.open(directory), backend, group, CPU, torch.float32)


def random_batch(seed: int, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and positions of several sequences in a row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (sum(lengths),), generator=generator)
    return ids, torch.cat([torch.arange(length) for length in lengths])


def stage_by_stage(model, ids, positions, metadata=None) -> torch.Tensor:
    """The model as its stages, alternating over the layers."""
    hidden = ids
    for layer in range(model.config.num_hidden_layers):
        hidden, residual = model.forward_attention(hidden, positions, layer, metadata)
        hidden = model.forward_ffn(hidden, residual, layer)
    return hidden


class Cached:
    """Steps of sequences of fixed block tables through a KV cache."""

    def __init__(self, model, count: int, max_blocks: int = 4) -> None:
        heads = model.backend.heads
        blocks = torch.randperm(count * max_blocks, generator=torch.Generator().manual_seed(0)) + 1
        self.tables = blocks.reshape(count, max_blocks).to(torch.int32)
        layers, blocks = model.config.num_hidden_layers, count * max_blocks + 1
        shape = (layers, 2, blocks, heads.num_kv_heads, BLOCK)
        self.cache = torch.zeros(*shape, heads.head_dim)
        model.bind_kv_cache(self.cache)
        self.lengths = [0] * count

    def prefill(self, sizes: list[int]) -> tuple[torch.Tensor, AttentionMetadata]:
        """Positions and metadata of the next `sizes` tokens of each sequence."""
        positions, slots = self.advance(sizes)
        cu = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        prefill = PrefillMetadata(self.tables, self.context(), cu, max(sizes))
        return positions, AttentionMetadata(slots, prefill=prefill)

    def decode(self) -> tuple[torch.Tensor, AttentionMetadata]:
        positions, slots = self.advance([1] * len(self.lengths))
        plan = torch.empty(0, dtype=torch.int32)
        decode = DecodeMetadata(self.tables, self.context(), plan, None)
        return positions, AttentionMetadata(slots, decode)

    def context(self) -> torch.Tensor:
        return torch.tensor(self.lengths, dtype=torch.int32)

    def advance(self, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        positions, slots = [], []
        for n, size in enumerate(sizes):
            for position in range(self.lengths[n], self.lengths[n] + size):
                positions.append(position)
                block = int(self.tables[n, position // BLOCK])
                slots.append(block * BLOCK + position % BLOCK)
            self.lengths[n] += size
        return torch.tensor(positions), torch.tensor(slots, dtype=torch.int32)


@torch.inference_mode()
@pytest.mark.parametrize("seed", SEEDS)
def test_logits_equal_those_of_transformers(tmp_path, seed):
    oracle = Shape.random(seed, KINDS[seed % len(KINDS)]).write(tmp_path)
    model = load(tmp_path)
    lengths = [7, 1, 40, 90]
    ids, positions = random_batch(seed, lengths)
    logits = model.compute_logits(model(ids, positions))
    expected = torch.cat([oracle(part[None]).logits[0] for part in ids.split(lengths)])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("seed", SEEDS)
def test_stages_in_turn_equal_the_whole_to_the_last_bit(tmp_path, seed):
    Shape.random(seed, KINDS[seed % len(KINDS)]).write(tmp_path)
    model = load(tmp_path)
    ids, positions = random_batch(seed, [5, 1, 33])
    whole = model(ids, positions)
    assert torch.equal(stage_by_stage(model, ids, positions), whole)


@torch.inference_mode()
@pytest.mark.parametrize("seed", SEEDS)
def test_stages_in_turn_equal_the_whole_with_a_kv_cache(tmp_path, seed):
    Shape.random(seed, KINDS[seed % len(KINDS)]).write(tmp_path)
    model = load(tmp_path)
    ids, _ = random_batch(seed, [5 + 20 + 17, 3])
    results = []
    for run in (model, lambda *args: stage_by_stage(model, *args)):
        cached = Cached(model, count=3)
        hidden = [run(ids[:42], *cached.prefill([5, 20, 17]))]
        hidden.append(run(ids[42:], *cached.decode()))
        hidden.append(run(ids[:42], *cached.prefill([20, 5, 17])))
        results.append((*hidden, cached.cache))
    for whole, staged in zip(*results, strict=True):
        assert torch.equal(whole, staged)


@torch.inference_mode()
def test_a_throwaway_cache_leaves_the_bound_one_as_it_was(tmp_path):
    Shape(layers=2).write(tmp_path)
    model = load(tmp_path)
    ids, positions = random_batch(0, [200, 4])
    alone = model(ids, positions)
    cached = Cached(model, count=1)
    cached.cache.normal_()
    before = cached.cache.clone()
    assert torch.equal(model(ids, positions), alone)
    with pytest.raises(KeyboardInterrupt), throwaway_cache(model, positions):
        raise KeyboardInterrupt
    assert torch.equal(cached.cache, before)
    assert model.kv_cache is cached.cache
    assert model.model.layers[1].self_attn.k_cache.data_ptr() == cached.cache[1, 0].data_ptr()


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


@torch.inference_mode()
def test_positions_that_the_rope_table_lacks_are_refused(tmp_path):
    """On a GPU they would be read from beyond it."""
    Shape(seed=5).write(tmp_path)
    config, group = load_config(tmp_path), ParallelGroup()
    backend = TorchBackend(config.rank_heads(group))
    model = load_model(config, None, backend, group, CPU, torch.float32, max_length=8)
    ids, positions = random_batch(0, [3, 9])
    assert model(ids[:11], positions[:11]).isfinite().all()
    for call in (model, model.forward_attention, PipelineScheduler(model).decode_token):
        with pytest.raises(ValueError, match=r"^positions up to 8 are not allowed.* below 8,"):
            call(ids, positions)


@pytest.mark.parametrize("positions", [[], [1], [5, 6, 0, 1], [0, 2], [0, 1, 1], [[0, 1]], 0])
def test_whole_sequences_count_up_from_0(positions):
    with pytest.raises(ValueError, match=r"^positions must count up from 0 in each sequence"):
        sequence_starts(torch.tensor(positions, dtype=torch.int64))


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
