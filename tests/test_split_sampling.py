"""Draws from a vocabulary that is split over ranks: the tokens of one rank, whatever the split."""

import random

import pytest
import torch

from nanovllm import SamplingParams
from nanovllm.kernels import reference_sampling
from nanovllm.kernels.reference_sampling import SAMPLE_TILE
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.layers.sampler import SamplingBatch, sample
from tests.thread_ranks import on_ranks, random_logits

CPU = torch.device("cpu")


def random_params(vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=random.choice([0.0, 0.2, 1.0, 3.0]),
        top_k=random.choice([-1, 1, 5, 20, 64, 65, 600, vocab // 2 + 1]),
        top_p=random.choice([1.0, 1.0, 0.05, 0.5, 0.999]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [300, 2 * SAMPLE_TILE, 5 * SAMPLE_TILE + 17])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_draw_the_tokens_of_one(size, vocab, dtype):
    rows = 12
    logits = random_logits(rows, vocab, dtype)
    params = [random_params(vocab) for _ in range(rows)]
    seeds = [random.getrandbits(63) for _ in range(rows)]
    packed = SamplingBatch.pack(params, seeds, list(range(rows)), list(range(rows)), vocab)

    def draw(group: ParallelGroup) -> torch.Tensor:
        shard = Shard.of_tiles(vocab, SAMPLE_TILE, group)
        return sample(logits[:, shard.span], SamplingBatch.unpack(packed, CPU), group, shard)

    expected = draw(ParallelGroup())
    for tokens in on_ranks(size, draw):
        assert tokens.tolist() == expected.tolist()


def test_of_equal_keys_the_lowest_token_is_drawn():
    logits = torch.zeros(1, SAMPLE_TILE)
    logits[0, ::2] = -0.0
    greedy = torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    keys = [
        reference_sampling.sample(logits, *greedy, None, (n * SAMPLE_TILE, 4096 * 3))
        for n in range(3)
    ]
    assert reference_sampling.token_of(torch.stack(keys).amax(0)).tolist() == [0]
