"""Decoders like Llama's and Qwen2's against transformers, on random weights copied by name."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from nanovllm.layers.attention import AttentionMetadata, DecodeMetadata, PrefillMetadata
from nanovllm.layers.attention_torch import TorchBackend
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models import make_model, parse_config

VOCAB, BLOCK, MAX_BLOCKS = 300, 16, 4
FAMILIES = {
    "llama": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        dict(qk_norm=False, qkv_bias=False, o_bias=False),
    ),
    "qwen2": (
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        dict(qk_norm=False, qkv_bias=True, o_bias=False),
    ),
    "qwen3": (
        transformers.Qwen3Config,
        transformers.Qwen3ForCausalLM,
        dict(qk_norm=True, qkv_bias=False, o_bias=False),
    ),
}


class Pair:
    """A transformers model of random weights, ours with the same, and sequences for both."""

    def __init__(self, family: str, *, tied: bool, lengths: list[int]) -> None:
        config_class, model_class, flags = FAMILIES[family]
        shape = {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": BLOCK * MAX_BLOCKS,
            "tie_word_embeddings": tied,
        }
        torch.manual_seed(len(lengths) + tied)
        self.oracle = model_class(config_class(**shape)).eval()
        for name, weight in self.oracle.named_parameters():
            torch.nn.init.normal_(weight, 1.0 if "norm" in name else 0.0, 0.2)
        fields = transformers.Qwen3Config(**shape).to_dict()
        config = dataclasses.replace(parse_config(fields), **flags)
        group = ParallelGroup()
        backend = TorchBackend(config.rank_heads(group))
        self.model = make_model(config, backend, group, torch.device("cpu"), torch.float32)
        weights = self.oracle.state_dict()
        slots = dict(self.model.slots())
        assert weights.keys() - slots.keys() <= ({"lm_head.weight"} if tied else set())
        for name, slot in slots.items():
            assert weights[name].shape == slot.shape
            slot.target.copy_(weights[name])
        self.texts = [torch.randint(VOCAB, (length,)) for length in lengths]
        blocks = torch.randperm(len(lengths) * MAX_BLOCKS) + 1
        self.tables = blocks.view(len(lengths), MAX_BLOCKS).to(torch.int32)
        self.model.bind_kv_cache(torch.zeros(3, 2, len(blocks) + 1, 2, BLOCK, 16))

    def check(self, decode: list[tuple[int, int]], prompts: list[tuple[int, int, int]]) -> None:
        """Runs a step and compares its logits.

        Args:
            decode: sequences, and the position of the token of each.
            prompts: sequences, and where the chunk of each begins and ends.
        """
        chunks = [(n, position, position + 1) for n, position in decode] + prompts
        ids, positions, slots, expected = [], [], [], []
        for n, start, end in chunks:
            position = torch.arange(start, end)
            ids.append(self.texts[n][start:end])
            positions.append(position)
            slots.append(self.tables[n, position // BLOCK] * BLOCK + position % BLOCK)
            expected.append(self.oracle(self.texts[n][None, :end]).logits[0, start:])
        metadata = AttentionMetadata(
            torch.cat(slots),
            DecodeMetadata(
                *self._places(chunks[: len(decode)]), torch.empty(0, dtype=torch.int32), None
            )
            if decode
            else None,
            self._prefill(prompts) if prompts else None,
        )
        hidden = self.model(torch.cat(ids), torch.cat(positions), metadata)
        torch.testing.assert_close(
            self.model.compute_logits(hidden), torch.cat(expected), rtol=1e-4, atol=1e-4
        )

    def _places(self, chunks: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        ends = torch.tensor([end for _, _, end in chunks], dtype=torch.int32)
        return self.tables[[n for n, _, _ in chunks]], ends

    def _prefill(self, prompts: list[tuple[int, int, int]]) -> PrefillMetadata:
        sizes = [end - start for _, start, end in prompts]
        starts = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
        return PrefillMetadata(*self._places(prompts), starts, max(sizes))


@torch.inference_mode()
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tied):
    """Prompts in chunks, tokens one by one, and steps in which some do one, some the other."""
    pair = Pair(family, tied=tied, lengths=[30, 21, 40, 64])
    pair.check([], [(0, 0, 17), (1, 0, 20)])
    pair.check([], [(0, 17, 28), (2, 0, 5)])
    pair.check([(0, 28), (1, 20)], [])
    pair.check([(0, 29)], [(2, 5, 39), (3, 0, 33)])
    pair.check([(2, 39), (3, 33)], [])


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_sequences_need_no_cache(family):
    pair = Pair(family, tied=False, lengths=[30, 1, 50])
    positions = torch.cat([torch.arange(len(text)) for text in pair.texts])
    logits = pair.model.compute_logits(pair.model(torch.cat(pair.texts), positions))
    expected = [pair.oracle(text[None]).logits[0] for text in pair.texts]
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_a_bias_or_norm_that_is_missing_would_be_noticed():
    """The slots of a family are exactly its tensors, so a checkpoint of another does not load."""
    names = {
        family: set(dict(Pair(family, tied=True, lengths=[2]).model.slots())) for family in FAMILIES
    }
    assert {name for name in names["qwen2"] if name.endswith("bias")} == {
        f"model.layers.{layer}.self_attn.{part}_proj.bias" for layer in range(3) for part in "qkv"
    }
    assert {name for name in names["qwen3"] - names["llama"] if "layers.0." in name} == {
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight",
    }


def test_stages_come_in_the_order_of_execution():
    model = Pair("llama", tied=True, lengths=[2]).model
    order = [(stage.layer, stage.name) for stage in model.stages()]
    kinds = ["qkv", "attention", "mlp"]
    assert order == [(-1, "mlp"), *((layer, kind) for layer in range(3) for kind in kinds)]
