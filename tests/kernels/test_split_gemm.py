"""Linear layers in parts, which the norm after them adds up."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import reference, small_gemm, split_gemm
from tests.kernels.cases import EPS, HALF, close, randn


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("num_sms", [132, 3])
@pytest.mark.parametrize("rows", [0, 3, 16, 50, 130])
@pytest.mark.parametrize(("inner", "features"), [(512, 64), (1536, 128)])
def test_linear_add_norm(poison, monkeypatch, num_sms, rows, inner, features, dtype):
    monkeypatch.setattr(split_gemm, "usable_sms", lambda device: num_sms)
    x, residual = randn(rows, inner, dtype=dtype), randn(rows, features, dtype=dtype)
    weight = randn(features, inner, dtype=dtype) * inner**-0.5
    norm_weight = randn(features, dtype=dtype)
    expected, expected_total = reference.linear_add_norm(
        x, weight, None, residual, norm_weight, EPS
    )
    y, total = split_gemm.linear_add_norm(x, weight, residual, norm_weight, EPS)
    close(total, expected_total, dtype)
    close(y, expected, dtype)
    parts = split_gemm.linear_parts(x, weight)
    assert parts.shape == (2 if num_sms == 3 and rows else 4, rows, features)


def test_it_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="100 rows; they must be a multiple of 64"):
        split_gemm.linear_parts(randn(9, 512).half(), randn(100, 512).half())
    with pytest.raises(ValueError, match="768 columns; they must be a multiple of 512"):
        split_gemm.linear_parts(randn(9, 768).half(), randn(64, 768).half())


def test_what_it_is_fast_for():
    x, small = randn(256, 512, dtype=torch.bfloat16), randn(512, 512, dtype=torch.bfloat16)
    large = torch.empty(4096, 12288, dtype=torch.bfloat16, device="meta")
    assert split_gemm.supports(x, small, None)
    assert not split_gemm.supports(x, small, small[0])
    assert not split_gemm.supports(x.repeat(2, 1), small, None)
    assert not split_gemm.supports(x, small.float(), None)
    assert not split_gemm.supports(x, small[:500], None)
    assert not split_gemm.supports(x, small[:, :384], None)
    assert not split_gemm.supports(x, large, None)
    assert split_gemm.row_counts(large) == []


def test_row_counts_meet_every_division():
    weight = torch.empty(1024, 2048, dtype=torch.bfloat16, device="meta")
    counts = split_gemm.row_counts(weight)
    assert min(counts) > small_gemm.MAX_ROWS, "fewer rows never come here"
    met = {split_gemm._division(rows, 1024, 132) for rows in counts}
    assert all(split_gemm._division(rows, 1024, 132) in met for rows in range(1, 257))
    assert len(met) == len(counts) == 4
