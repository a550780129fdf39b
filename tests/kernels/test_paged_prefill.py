"""Prefill attention over the paged cache."""

import pytest
import torch

from nanovllm.kernels import paged_prefill
from tests.kernels import reference
from tests.kernels.cases import HALF, close
from tests.kernels.paged_case import PagedCase


def test_references_are_torchs_attention():
    case = PagedCase([1, 37, 16], 6, 2, 32, 16)
    close(reference.paged_decode_attention(*case.cache(), case.lens, case.scale), case.dense())
    case = PagedCase([1, 37, 16], 6, 2, 32, 16, [1, 20, 16])
    close(case.prefill(reference), case.dense())


@pytest.mark.parametrize("block_size", [256, 64, 48, 16])
@pytest.mark.parametrize(
    ("context", "rows"),
    [
        ([5], [5]),
        ([1, 100, 33], [1, 100, 33]),
        ([150, 70, 1, 129], [22, 70, 1, 1]),  # cached prefixes and a decode row
        ([260], [200]),
    ],
)
def test_prefill(poison, context, rows, block_size):
    case = PagedCase(context, 2, 1, 32, block_size, rows)
    close(case.prefill(paged_prefill), case.dense())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_prefill_of_grouped_heads(poison, group, dim):
    case = PagedCase([90, 20], 2 * group, 2, dim, 64, [30, 20])
    close(case.prefill(paged_prefill), case.dense())


@pytest.mark.parametrize("dtype", HALF)
def test_prefill_in_16_bits(poison, dtype):
    case = PagedCase([150, 140], 4, 2, 64, 256, [22, 140], dtype=dtype)
    close(case.prefill(paged_prefill), case.dense(), dtype)


def test_prefill_into_rows_of_a_larger_result(poison):
    case = PagedCase([70, 33], 4, 2, 32, 16, [70, 3])
    out = torch.full((80, *case.q.shape[1:]), 7.0, device=case.q.device)
    assert case.prefill(paged_prefill, out[5:78]).data_ptr() == out[5:].data_ptr()
    close(out[5:78], case.dense())
    assert (out[:5] == 7).all()
    assert (out[78:] == 7).all()
