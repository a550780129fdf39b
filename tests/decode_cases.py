"""Decode steps to test with: a small model whose KV cache holds the beginnings of sequences."""

from __future__ import annotations

import dataclasses
import itertools
import random

import torch
import transformers

from nanovllm.engine import kv_cache
from nanovllm.engine.step_inputs import StepTensors
from nanovllm.layers.attention import DecodeMetadata, PrefillMetadata, make_backend
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models.qwen3 import Qwen3ForCausalLM, rank_heads
from nanovllm.models.qwen3_config import Qwen3Config
from tests.checkpoints import VOCAB, Shape

CPU = torch.device("cpu")
BLOCK_SIZE = 16
MAX_BLOCKS = 8


def model_like(oracle: transformers.Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """Our float32 model with the weights of `oracle`."""
    config = Qwen3Config.from_dict(oracle.config.to_dict())
    group = ParallelGroup()
    backend = make_backend("torch", rank_heads(config, group), CPU, BLOCK_SIZE)
    model = Qwen3ForCausalLM.allocate(config, backend, group, CPU, torch.float32)
    weights = oracle.state_dict()
    for name, slot in model.slots():
        slot.target.copy_(weights[name])
    return model


class DecodeCase:
    """Sequences of random tokens, all but the last of each in the KV cache.

    Args:
        shape: of the model.
        count: of the sequences, whose lengths are random.
        seed: of tokens, lengths and places in the cache.
    """

    def __init__(self, shape: Shape, count: int, seed: int = 0) -> None:
        self.rng = rng = random.Random(seed)
        self.oracle = shape.build()
        self.model = model_like(self.oracle)
        heads = self.model.model.layers[0].self_attn.heads
        num_blocks = count * MAX_BLOCKS
        self.cache = kv_cache.allocate(
            shape.layers, num_blocks, BLOCK_SIZE, heads, torch.float32, CPU
        )
        self.model.bind_kv_cache(self.cache)
        blocks = rng.sample(range(1, num_blocks + 1), num_blocks)
        self.tables = torch.tensor(blocks, dtype=torch.int32).view(count, MAX_BLOCKS)
        self.contexts = [self._tokens(rng.choice([1, 2, 16, 17, rng.randint(3, 100)]))
                         for _ in range(count)]  # fmt: skip
        self._prefill()

    def step(self) -> StepTensors:
        """The inputs of the decode step of each sequence's last token."""
        return self._part(range(len(self.contexts)))

    def parts(self, sizes: list[int]) -> list[StepTensors]:
        """The same in micro-batches of so many sequences."""
        ends = itertools.accumulate(sizes, initial=0)
        return [self._part(range(*pair)) for pair in itertools.pairwise(ends)]

    @staticmethod
    def padding_like(inputs: StepTensors) -> StepTensors:
        """Inputs of the same shapes that are safe to run but wrong."""
        places, zeros = inputs.metadata, torch.zeros_like
        assert isinstance(places, DecodeMetadata)
        metadata = dataclasses.replace(
            places,
            slot_mapping=zeros(places.slot_mapping),
            block_tables=zeros(places.block_tables),
            context_lens=torch.ones_like(places.context_lens),
        )
        return StepTensors(zeros(inputs.input_ids), zeros(inputs.positions), metadata)

    def _part(self, rows: range) -> StepTensors:
        contexts = [self.contexts[n] for n in rows]
        lengths = torch.tensor([len(context) for context in contexts], dtype=torch.int32)
        tiles = itertools.accumulate((-(-n // 64) for n in lengths.tolist()), initial=0)
        metadata = DecodeMetadata(
            torch.cat(
                [self._slots(n, len(c) - 1, len(c)) for n, c in zip(rows, contexts, strict=True)]
            ),
            self.tables[rows.start : rows.stop],
            lengths,
            torch.tensor(list(tiles), dtype=torch.int32),
            None,
        )
        last = torch.tensor([context[-1] for context in contexts], dtype=torch.int32)
        return StepTensors(last, lengths - 1, metadata)

    def append_tokens(self) -> None:
        """Makes every sequence one random token longer."""
        for context in self.contexts:
            context += self._tokens(1)

    def expected_logits(self) -> torch.Tensor:
        """What transformers says after the contexts."""
        with torch.inference_mode():
            return torch.stack(
                [self.oracle(torch.tensor([context])).logits[0, -1] for context in self.contexts]
            )

    def _tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(2, VOCAB) for _ in range(count)]

    def _slots(self, sequence: int, begin: int, end: int) -> torch.Tensor:
        positions = torch.arange(begin, end)
        blocks = self.tables[sequence][positions // BLOCK_SIZE].long()
        return (blocks * BLOCK_SIZE + positions % BLOCK_SIZE).to(torch.int32)

    @torch.inference_mode()
    def _prefill(self) -> None:
        for n, context in enumerate(self.contexts):
            size = len(context) - 1
            if size:
                metadata = PrefillMetadata(
                    self._slots(n, 0, size),
                    self.tables[n : n + 1],
                    torch.tensor([size], dtype=torch.int32),
                    torch.tensor([0, size], dtype=torch.int32),
                    size,
                )
                self.model(torch.tensor(context[:size]), torch.arange(size), metadata)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance over size, in the Frobenius norm."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm())
