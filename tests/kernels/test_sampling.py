"""Sampling: which token is taken, and that draws by chance follow the softmax."""

import math
import random

import pytest
import torch

from nanovllm.kernels import reference_sampling, sampling
from tests.kernels.cases import DEVICE, decided, sampling_case, within

SAMPLERS = pytest.mark.parametrize("sample", [reference_sampling.sample, sampling.sample])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [5, 4096, 10000])
def test_sample_agrees_with_its_reference(poison, vocab, dtype):
    case = sampling_case(9, vocab, dtype)
    rows = decided(reference_sampling.sample, case)
    assert torch.equal(sampling.sample(*case)[rows], reference_sampling.sample(*case)[rows])


@SAMPLERS
def test_greedy_takes_the_lowest_of_equals(poison, sample):
    logits, temperatures, seeds, steps = sampling_case(4, 9000)
    for row, first in enumerate((17, 4095, 4097, 8999)):
        logits[row, first:] = 50.0
    tokens = sample(logits, torch.zeros_like(temperatures), seeds, steps)
    assert tokens.tolist() == [17, 4095, 4097, 8999]


@SAMPLERS
def test_excluded_tokens_are_never_drawn(poison, sample):
    logits, temperatures, seeds, steps = sampling_case(6, 5000)
    allowed = torch.zeros(5000, dtype=torch.bool, device=DEVICE)
    allowed[[3, 4100]] = True
    tokens = sample(logits.masked_fill(~allowed, float("-inf")), temperatures, seeds, steps)
    assert set(tokens.tolist()) <= {3, 4100}


@SAMPLERS
@pytest.mark.parametrize("vocab", [1, 5, 9000])
def test_a_draw_is_a_token_or_says_that_the_logits_are_not_numbers(poison, sample, vocab):
    """No row may leave the vocabulary: the next step looks its token up in the embedding."""
    logits, temperatures, seeds, steps = sampling_case(12, vocab)
    nan, inf = float("nan"), float("inf")
    for row, value in enumerate((nan, nan, -inf, -inf, inf, inf)):
        logits[row] = value
    for row in range(6, 9):
        logits[row, torch.rand(vocab, device=DEVICE) < 0.5] = inf
    for row in range(9, 12):
        logits[row, random.randrange(vocab)] = nan
    temperatures[1], temperatures[3], temperatures[7] = 0.7, 1e-30, 1e30
    high = torch.full((12,), 1e9, device=DEVICE), torch.full((12,), vocab, device=DEVICE).int()
    for threshold in (None, high):  # a NaN is found even where no token may be drawn
        tokens = sample(logits, temperatures, seeds, steps, threshold)
        drawn = tokens[4:9] if threshold is None else tokens[:0]
        assert ((drawn >= 0) & (drawn < vocab)).all()
        assert set(tokens[:4].tolist() + tokens[9:].tolist()) == {-1}


@SAMPLERS
def test_a_draw_depends_on_its_own_row_only(poison, sample):
    logits, temperatures, seeds, steps = sampling_case(6, 3000)
    together = sample(logits, temperatures, seeds, steps)
    for n in range(6):
        row = slice(n, n + 1)
        assert sample(logits[row], temperatures[row], seeds[row], steps[row]) == together[row]


@SAMPLERS
def test_rows_may_be_strided(poison, sample):
    logits, *rest = sampling_case(5, 4200)
    wide = torch.cat([logits, logits + 100], dim=1)
    assert torch.equal(sample(wide[:, :4200], *rest), sample(logits, *rest))


@SAMPLERS
def test_a_draw_keeps_to_the_threshold(poison, sample):
    logits, temperatures, seeds, steps = sampling_case(6, 5000)
    logits = logits.round()
    threshold = logits.amax(-1) - 1, torch.full((6,), 3000, dtype=torch.int32, device=DEVICE)
    kept = logits.masked_fill(~within(logits, threshold), float("-inf"))
    expected = sample(kept, temperatures, seeds, steps)
    assert torch.equal(sample(logits, temperatures, seeds, steps, threshold), expected)


def chi_square(counts, probs):
    """How far chi-square lies above what is expected, in its standard deviations."""
    expected = probs * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(probs) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


def test_random_bits_are_uniform_and_uncorrelated():
    seeds = torch.arange(40, device=DEVICE)[:, None] + random.randrange(2**40)
    bits = reference_sampling.random_bits(
        seeds, torch.zeros_like(seeds), torch.arange(5000, device=DEVICE)
    )
    for byte in range(4):
        counts = torch.bincount(((bits >> (8 * byte)) & 255).flatten(), minlength=256).double()
        assert chi_square(counts, torch.full((256,), 1 / 256, device=DEVICE)) < 7
    uniform = bits.double() / 2**32 - 0.5
    limit = 6 / 12 / math.sqrt(bits.numel())  # 6 sigma of a mean of products of variance 1/144
    assert abs(uniform.mean()) < 6 * math.sqrt(1 / 12 / bits.numel())
    assert abs((uniform[:, 1:] * uniform[:, :-1]).mean()) < limit  # neighbouring tokens
    assert abs((uniform[1:] * uniform[:-1]).mean()) < limit  # neighbouring seeds


def test_exponential_has_fine_tails():
    bits = torch.tensor([0, 1, 2**20, 2**26 - 1, 2**26, 2**31, 2**32 - 1], device=DEVICE)
    exact = -torch.log1p(-(bits.double() + 0.5) / 2**32)
    actual = reference_sampling.exponential(bits)
    assert (actual > 0).all()
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[:-1].double(), exact[:-1], rtol=5e-6, atol=0)
    assert actual[-1] > 16
