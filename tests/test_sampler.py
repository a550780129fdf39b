"""Sampling: which tokens may be drawn, how often, equal ones by equal seeds and on all ranks."""

import random

import pytest
import torch

from nanovllm import SamplingParams, kernels
from nanovllm.kernels import reference_sampling
from nanovllm.kernels.reference_sampling import SAMPLE_TILE
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.layers.sampler import SamplingBatch, sample
from nanovllm.layers.split_threshold import Limits, find_threshold
from tests.kernels.cases import within
from tests.logit_oracle import check_frequencies, distribution
from tests.thread_ranks import on_ranks, random_logits

CPU = torch.device("cpu")
ONE = ParallelGroup()


def draw(logits, params, seeds, steps=None):
    """One token per row of `logits`."""
    count = len(logits)
    batch = batch_of(
        params if isinstance(params, list) else [params] * count,
        list(seeds),
        list(steps or [0] * count),
        logits.shape[1],
    )
    return sample(logits, batch, ONE, Shard.of(logits.shape[1], ONE)).tolist()


def batch_of(params, seeds, steps, vocab_size):
    packed = SamplingBatch.pack(params, seeds, steps, list(range(len(params))), vocab_size)
    return SamplingBatch.unpack(packed, CPU)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=5),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.5, top_k=8, top_p=0.8),
    ],
    ids=str,
)
@pytest.mark.parametrize("vary", ["seed", "step"])
def test_tokens_are_drawn_as_often_as_their_probability_says(params, vary):
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 1.5
    count = 4000
    seeds, steps = (range(count), None) if vary == "seed" else ([7] * count, range(count))
    drawn = draw(logits.repeat(count, 1), params, seeds, steps)
    check_frequencies(torch.tensor(drawn), distribution(logits, params))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, top_k=3, top_p=0.5),
        SamplingParams(top_k=1),
        SamplingParams(temperature=100, top_k=1),
        SamplingParams(top_p=1e-9),
        SamplingParams(top_p=1e-300),
        SamplingParams(temperature=1e-3),
        SamplingParams(temperature=1e-30),
        SamplingParams(temperature=1e-44),
        SamplingParams(temperature=1e-300),
        SamplingParams(temperature=1e-44, top_p=0.5),
        SamplingParams(temperature=1e-44, top_k=2),
    ],
    ids=str,
)
def test_greedy_and_the_same_in_other_words(params):
    logits = torch.randperm(8 * 100).reshape(8, 100).float() - 400
    logits[0, :50] = 0.0
    assert draw(logits, params, range(8)) == logits.argmax(-1).tolist()


def test_rows_of_one_batch_keep_their_own_options():
    logits = torch.arange(1000.0).repeat(5, 1) * 1e-3
    params = [
        SamplingParams(temperature=0),
        SamplingParams(),
        SamplingParams(top_k=1),
        SamplingParams(top_k=10),
        SamplingParams(top_p=0.05),
    ]
    seen = [set() for _ in params]
    for step in range(200):
        for row, token in enumerate(draw(logits, params, range(5), [step] * 5)):
            seen[row].add(token)
    assert seen[0] == seen[2] == {999}
    assert min(seen[1]) < 100
    assert seen[3] == set(range(990, 1000))
    lowest = int(distribution(logits[0], params[4]).nonzero().min())
    assert lowest <= min(seen[4]) < 990


@pytest.mark.parametrize("top_k", [-1, 0, 50, 51, 10**9])
def test_a_top_k_of_the_whole_vocabulary_or_more_is_no_limit(top_k):
    batch = batch_of([SamplingParams(top_k=top_k)], [0], [0], 50)
    assert batch.limits is None


def test_only_the_limits_that_rows_have_are_looked_for():
    plain = SamplingParams(temperature=0, top_k=5, top_p=0.5)  # greedy: nothing to filter
    few, nucleus = SamplingParams(top_k=5), SamplingParams(top_p=0.5)

    def limits(*params):
        count = len(params)
        ids = list(range(count))
        batch = batch_of(list(params), ids, ids, 50)
        return batch.limits and [None if x is None else x.tolist() for x in batch.limits]

    assert limits(plain) is None
    assert limits(plain, few) == [[1], [5], None]
    assert limits(nucleus, plain) == [[0], None, [0.5]]
    assert limits(few, plain, nucleus) == [[0, 2], [5, 50], [1.0, 0.5]]


def test_the_logits_are_left_as_they_were():
    logits = torch.randn(3, 40)
    before = logits.clone()
    draw(logits, SamplingParams(top_k=2, top_p=0.5), range(3))
    assert torch.equal(logits, before)


# ------------------------------------------------------------------ on several ranks


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
    batch = batch_of(params, seeds, list(range(rows)), vocab)

    def draw_part(group: ParallelGroup) -> torch.Tensor:
        shard = Shard.of_tiles(vocab, SAMPLE_TILE, group)
        return sample(logits[:, shard.span], batch, group, shard)

    expected = draw_part(ONE)
    for tokens in on_ranks(size, draw_part):
        assert tokens.tolist() == expected.tolist()


def test_ranks_agree_where_a_limit_falls_between_equal_tokens():
    """Half of 20 equal tokens are 10, whoever adds up their probabilities."""
    vocab = 700
    logits = torch.full((40, vocab), float("-inf"))
    for row in logits:
        row[torch.randperm(vocab)[: random.randint(1, vocab)]] = random.choice([0.0, 3.0])
    limits = Limits(
        torch.arange(40),
        torch.tensor([random.choice([20, 64, 65, 100, 600, vocab]) for _ in logits]),
        torch.tensor([random.choice([0.05, 0.1, 0.2, 0.5, 0.75, 0.99]) for _ in logits]),
    )
    temperatures = torch.full((40,), 0.7)
    expected = within(logits, kernels.find_threshold(logits, temperatures, *limits))

    def what_stays(group: ParallelGroup) -> torch.Tensor:
        part = logits.tensor_split(group.size, 1)[group.rank]
        return within(part, find_threshold(part, temperatures, limits, 0, group))

    assert torch.equal(torch.cat(on_ranks(4, what_stays), 1), expected)


def test_of_equal_keys_the_lowest_token_is_drawn():
    logits = torch.zeros(1, SAMPLE_TILE)
    logits[0, ::2] = -0.0
    greedy = torch.zeros(1), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    keys = [
        reference_sampling.sample(logits, *greedy, None, (n * SAMPLE_TILE, 4096 * 3))
        for n in range(3)
    ]
    assert reference_sampling.token_of(torch.stack(keys).amax(0)).tolist() == [0]
