"""Decoders of every architecture against transformers, on random weights copied by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanovllm import LLM
from nanovllm.layers.attention import AttentionMetadata, DecodeMetadata, PrefillMetadata
from nanovllm.models import architectures
from nanovllm.models.architectures import ARCHITECTURES, Architecture
from nanovllm.models.rules import NULL
from tests.checkpoints import TABLE, VOCAB, Shape, greedy, prompts
from tests.decode_cases import model_like

BLOCK, MAX_BLOCKS = 16, 4
SHAPE = Shape(layers=3, hidden=48, intermediate=80, head_dim=16)


class Pair:
    """A transformers model of random weights, ours with the same, and sequences for both."""

    def __init__(self, model_type: str, *, tied: bool, lengths: list[int]) -> None:
        shape = replace(SHAPE, model_type=model_type, tied=tied, seed=len(lengths) + tied)
        self.oracle = shape.build()
        self.model = model_like(self.oracle)
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
@pytest.mark.parametrize("model_type", TABLE)
def test_logits_are_those_of_transformers(model_type, tied):
    """Prompts in chunks, tokens one by one, and steps in which some do one, some the other."""
    pair = Pair(model_type, tied=tied, lengths=[30, 21, 40, 64])
    pair.check([], [(0, 0, 17), (1, 0, 20)])
    pair.check([], [(0, 17, 28), (2, 0, 5)])
    pair.check([(0, 28), (1, 20)], [])
    pair.check([(0, 29)], [(2, 5, 39), (3, 0, 33)])
    pair.check([(2, 39), (3, 33)], [])


@pytest.mark.parametrize("model_type", TABLE)
def test_a_checkpoint_of_another_architecture_would_not_load(model_type):
    """A model's weights are those that transformers has, biases and norms included."""
    pair = Pair(model_type, tied=True, lengths=[2])
    assert pair.model.weight_shards().keys() == pair.oracle.state_dict().keys() - {"lm_head.weight"}


def test_stages_come_in_the_order_of_execution():
    model = Pair("qwen3", tied=True, lengths=[2]).model
    order = [(stage.layer, stage.name) for stage in model.stages()]
    kinds = ["qkv", "attention", "mlp"]
    assert order == [(-1, "mlp"), *((layer, kind) for layer in range(3) for kind in kinds)]


def test_a_new_architecture_is_an_entry_of_the_table(tmp_path, monkeypatch):
    """Mistral, without its sliding window."""
    mistral = Architecture(
        name="MistralForCausalLM",
        model_type="mistral",
        ropes=("default",),
        qkv_bias=False,
        o_bias=False,
        own_fields={"sliding_window": (NULL, 4096)},
    )
    monkeypatch.setattr(architectures, "ARCHITECTURES", (*ARCHITECTURES, mistral))
    oracle = replace(SHAPE, model_type="mistral", more={"sliding_window": None}).write(tmp_path)
    given = prompts(0, count=4)
    with LLM(str(tmp_path), device="cpu", max_model_len=128) as llm:
        outputs = llm.generate(given, temperature=0, max_tokens=12, use_tqdm=False)
    for prompt, output in zip(given, outputs, strict=True):
        assert output["token_ids"] == greedy(oracle, prompt, 12)
