"""Draws and sums over a part of the vocabulary agree with their references."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import reference, sampling, split_logits
from nanovllm.kernels.reference import SAMPLE_TILE, key_of, token_of, value_of
from tests.kernels.cases import DEVICE, sampling_case

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("vocab", [0, 5, 2 * SAMPLE_TILE + 3])
def test_parts_draw_as_their_reference_does(poison, vocab, dtype):
    case, part = sampling_case(7, vocab, dtype), (3 * SAMPLE_TILE, 9 * SAMPLE_TILE)
    tokens = token_of(sampling.sample(*case, None, part))
    assert torch.equal(tokens, token_of(reference.sample(*case, None, part)))
    inside = (tokens >= part[0]) & (tokens < part[0] + vocab)
    assert inside.all() if vocab else (tokens == -1).all()


@DTYPES
@pytest.mark.parametrize("vocab", [1, 300, 9000])
def test_numbers_and_weights_from_keys_on(poison, vocab, dtype):
    logits, temperatures, *_ = sampling_case(5, vocab, dtype)
    temperatures = temperatures.clamp(min=0.1)
    logits[1, :] = float("-inf")
    logits[2, 0] = float("nan")
    rows = torch.tensor([0, 1, 2, 4], device=DEVICE)
    peaks = logits[rows].float().nan_to_num(-9.0).amax(1).clamp(min=-1e38)
    keys = key_of(torch.randn(4, 16, device=DEVICE) * 2, dtype)
    found = split_logits.weigh(logits, temperatures, rows, peaks, keys).double()
    expected = reference.weigh(logits, temperatures, rows, peaks, keys)
    assert torch.equal(found[..., 0], expected[..., 0])
    torch.testing.assert_close(found[..., 1], expected[..., 1], rtol=1e-4, atol=1e-4)


@DTYPES
def test_keys_order_values_and_give_them_back(dtype):
    values = (torch.randn(1000, device=DEVICE) * 10).to(dtype).float().sort().values
    keys = key_of(values, dtype)
    assert torch.equal(keys, keys.sort().values)
    assert torch.equal(value_of(keys, dtype), values)
    assert key_of(torch.tensor([-0.0]), dtype) == key_of(torch.tensor([0.0]), dtype)
