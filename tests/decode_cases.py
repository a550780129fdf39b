"""Decode steps to test with: a small model whose KV cache holds the beginnings of sequences."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import torch
import transformers

from nanovllm.engine import kv_cache
from nanovllm.layers.attention import AttentionMetadata, DecodeMetadata, PrefillMetadata
from nanovllm.layers.attention_backends import make_backend
from nanovllm.layers.attention_torch import TorchBackend
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models import make_model, parse_config
from nanovllm.models.decoder import DecoderForCausalLM
from nanovllm.models.stage import StepTensors
from tests.checkpoints import VOCAB, Shape

CPU = torch.device("cpu")
BLOCK_SIZE = 16
MAX_BLOCKS = 8


class PlanningBackend(TorchBackend):
    """Torch's attention with a plan that is easy to check: the context lengths."""

    def plan_size(self, num_seqs: int) -> int:
        return num_seqs

    def plan(self, context_lens: np.ndarray) -> np.ndarray:
        return context_lens.astype(np.int32)


def model_like(oracle: transformers.Qwen3ForCausalLM) -> DecoderForCausalLM:
    """Our float32 model with the weights of `oracle`."""
    config = parse_config(oracle.config.to_dict())
    group = ParallelGroup()
    backend = make_backend("torch", config.rank_heads(group), CPU, BLOCK_SIZE)
    model = make_model(config, backend, group, torch.float32)
    model.allocate(CPU)
    weights = oracle.state_dict()
    for name, shard in model.weight_shards().items():
        shard.target.copy_(weights[name])
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
        heads = self.model.backend.heads
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

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions of all contexts, one after the other."""
        tokens = torch.tensor(list(itertools.chain.from_iterable(self.contexts)))
        return tokens, torch.cat([torch.arange(len(context)) for context in self.contexts])

    @staticmethod
    def padding_like(inputs: StepTensors) -> StepTensors:
        """Inputs of the same shapes that are safe to run but wrong."""
        places, zeros = inputs.metadata, torch.zeros_like
        assert places.decode is not None
        decode = dataclasses.replace(
            places.decode,
            block_tables=zeros(places.decode.block_tables),
            context_lens=torch.ones_like(places.decode.context_lens),
        )
        metadata = AttentionMetadata(zeros(places.slot_mapping), decode)
        return StepTensors(zeros(inputs.input_ids), zeros(inputs.positions), metadata)

    def _part(self, rows: range) -> StepTensors:
        contexts = [self.contexts[n] for n in rows]
        lengths = torch.tensor([len(context) for context in contexts], dtype=torch.int32)
        plan = torch.from_numpy(self.model.backend.plan(lengths.numpy()))
        metadata = AttentionMetadata(
            torch.cat(
                [self._slots(n, len(c) - 1, len(c)) for n, c in zip(rows, contexts, strict=True)]
            ),
            DecodeMetadata(self.tables[rows.start : rows.stop], lengths, plan, None),
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
                prefill = PrefillMetadata(
                    self.tables[n : n + 1],
                    torch.tensor([size], dtype=torch.int32),
                    torch.tensor([0, size], dtype=torch.int32),
                    size,
                )
                metadata = AttentionMetadata(self._slots(n, 0, size), prefill=prefill)
                self.model(torch.tensor(context[:size]), torch.arange(size), metadata)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance over size, in the Frobenius norm."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm())
