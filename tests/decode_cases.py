"""Decode steps to test with: a small model whose KV cache holds the beginnings of sequences."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import transformers

from nanovllm.engine import kv_cache
from nanovllm.layers.attention import (
    AttentionMetadata,
    DecodeMetadata,
    PrefillMetadata,
    TorchBackend,
    make_backend,
)
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models import make_model, parse_config
from nanovllm.models.decoder import DecoderForCausalLM
from nanovllm.models.stage import StepTensors
from tests.checkpoints import VOCAB, Shape

CPU = torch.device("cpu")
BLOCK_SIZE = 16
MAX_BLOCKS = 8

Places = Sequence[tuple[int, int, int]]  # number of a sequence, begin and end of its tokens


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


class Sequences:
    """A transformers model, ours with the same weights, and random texts for both.

    Args:
        shape: of the model.
        lengths: of the texts, up to 128.
        seed: of the texts, and of their places in a KV cache that is empty yet.
    """

    def __init__(self, shape: Shape, lengths: list[int], seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.oracle = shape.build()
        self.model = model_like(self.oracle)
        num_blocks = len(lengths) * MAX_BLOCKS
        self.cache = kv_cache.allocate(
            shape.layers, num_blocks, BLOCK_SIZE, self.model.backend.heads, torch.float32, CPU
        )
        self.model.bind_kv_cache(self.cache)
        blocks = self.rng.sample(range(1, num_blocks + 1), num_blocks)
        self.tables = torch.tensor(blocks, dtype=torch.int32).view(len(lengths), MAX_BLOCKS)
        self.texts = [self.tokens(length) for length in lengths]

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(2, VOCAB) for _ in range(count)]

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and positions of all texts, one after the other."""
        tokens = torch.tensor(list(itertools.chain.from_iterable(self.texts)))
        return tokens, torch.cat([torch.arange(len(text)) for text in self.texts])

    def inputs(self, decode: Places, chunks: Places = ()) -> StepTensors:
        """A step of tokens from begin to end: of sequences that decode, then of prompts."""
        rows = [*decode, *chunks]
        positions = torch.cat([torch.arange(begin, end) for _, begin, end in rows])
        sequence = torch.tensor([n for n, begin, end in rows for _ in range(begin, end)])
        slots = self.tables[sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        metadata = AttentionMetadata(slots.to(torch.int32))
        if decode:
            tables, ends = self._known(decode)
            plan = torch.from_numpy(self.model.backend.plan(ends.numpy()))
            metadata = replace(metadata, decode=DecodeMetadata(tables, ends, plan, None))
        if chunks:
            sizes = [end - begin for _, begin, end in chunks]
            starts = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
            prefill = PrefillMetadata(*self._known(chunks), starts, max(sizes))
            metadata = replace(metadata, prefill=prefill)
        tokens = [token for n, begin, end in rows for token in self.texts[n][begin:end]]
        return StepTensors(torch.tensor(tokens, dtype=torch.int32), positions, metadata)

    @torch.inference_mode()
    def expected(self, decode: Places, chunks: Places = ()) -> torch.Tensor:
        """The logits of that step, by transformers."""
        return torch.cat(
            [
                self.oracle(torch.tensor([self.texts[n][:end]])).logits[0, begin:]
                for n, begin, end in [*decode, *chunks]
            ]
        )

    def _known(self, rows: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Block tables and context lengths."""
        ends = torch.tensor([end for _, _, end in rows], dtype=torch.int32)
        return self.tables[[n for n, _, _ in rows]], ends


class DecodeCase(Sequences):
    """So many sequences of random lengths, all but the last token of each in the KV cache."""

    def __init__(self, shape: Shape, count: int, seed: int = 0) -> None:
        rng = random.Random(seed)
        lengths = [rng.choice([1, 2, 16, 17, rng.randint(3, 100)]) for _ in range(count)]
        super().__init__(shape, lengths, seed)
        if before := [(n, 0, length - 1) for n, length in enumerate(lengths) if length > 1]:
            run(self.model, self.inputs([], before))

    def step(self) -> StepTensors:
        """The inputs of the decode step of each sequence's last token."""
        return self.inputs(self._last())

    def parts(self, sizes: list[int]) -> list[StepTensors]:
        """The same in micro-batches of so many sequences."""
        last, ends = self._last(), itertools.accumulate(sizes, initial=0)
        return [self.inputs(last[begin:end]) for begin, end in itertools.pairwise(ends)]

    def expected_logits(self) -> torch.Tensor:
        return self.expected(self._last())

    def append_tokens(self) -> None:
        """Makes every sequence one random token longer."""
        for text in self.texts:
            text += self.tokens(1)

    @staticmethod
    def padding_like(inputs: StepTensors) -> StepTensors:
        """Inputs of the same shapes that are safe to run but wrong."""
        places, zeros = inputs.metadata, torch.zeros_like
        assert places.decode is not None
        decode = replace(
            places.decode,
            block_tables=zeros(places.decode.block_tables),
            context_lens=torch.ones_like(places.decode.context_lens),
        )
        metadata = AttentionMetadata(zeros(places.slot_mapping), decode)
        return StepTensors(zeros(inputs.input_ids), zeros(inputs.positions), metadata)

    def _last(self) -> list[tuple[int, int, int]]:
        return [(n, len(text) - 1, len(text)) for n, text in enumerate(self.texts)]


@torch.inference_mode()
def run(model: DecoderForCausalLM, inputs: StepTensors) -> torch.Tensor:
    return model(inputs.input_ids, inputs.positions, inputs.metadata)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance over size, in the Frobenius norm."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm())
