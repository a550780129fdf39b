"""Linear layers of few rows: the kernel against its reference, that against torch."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import small_gemm
from nanovllm.kernels.normed import Normed
from tests.kernels import reference
from tests.kernels.cases import EPS, HALF, close, randn


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("inner", "features"), [(256, 8), (768, 100), (1024, 24)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_small_gemm(poison, count, inner, features, dtype):
    x, bias = randn(count, inner, dtype=dtype), randn(2 * features, dtype=dtype)
    weight = randn(2 * features, inner, dtype=dtype) * inner**-0.5
    for args in ((weight,), (weight, bias)):
        close(small_gemm.linear(Normed(x), *args), reference.linear(x, *args), dtype)
    expected = reference.linear_silu_mul(x, weight)
    close(small_gemm.linear(Normed(x), weight, gated=True), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("inner", "features"), [(256, 256), (768, 512), (256, 2304)])
@pytest.mark.parametrize("count", [1, 8])
def test_a_norm_between_two_small_layers(poison, count, inner, features, biased, dtype):
    x, residual = randn(count, inner, dtype=dtype), randn(count, features, dtype=dtype)
    weight = randn(features, inner, dtype=dtype) * inner**-0.5
    bias = randn(features, dtype=dtype) if biased else None
    norm_weight = randn(features, dtype=dtype)
    before = x, weight, bias, residual, norm_weight, EPS
    expected, expected_total = reference.linear_add_norm(*before)
    normed, total = small_gemm.linear_add_norm(*before)
    close(total, expected_total, dtype)
    close(normed.materialize(), expected, dtype)
    after = randn(24, features, dtype=dtype) * features**-0.5
    close(small_gemm.linear(normed, after), reference.linear(expected, after), dtype)
    gated = reference.linear_silu_mul(expected, after)
    close(small_gemm.linear(normed, after, gated=True), gated, dtype)


def test_features_that_do_not_fill_the_last_program(poison):
    x, residual, weight = randn(3, 256), randn(3, 100), randn(100, 256) / 16
    normed, total = small_gemm.linear_add_norm(x, weight, None, residual, randn(100), EPS)
    close(normed.sum_sq.sum(1), total.square().sum(1))


def test_a_norm_that_is_done_is_not_done_again():
    x = randn(3, 8)
    assert Normed(x).materialize() is x


def test_linear_references_are_torchs():
    x, weight, bias = randn(5, 96), randn(40, 96), randn(40)
    close(reference.linear(x, weight, bias), F.linear(x, weight, bias))
    close(reference.linear_silu_mul(x, weight), reference.silu_mul(F.linear(x, weight)))


def test_which_inputs_it_is_for():
    assert small_gemm.supports(randn(8, 256, dtype=torch.bfloat16))
    for x in (randn(9, 256), randn(8, 320)):
        assert not small_gemm.supports(x.half())
    assert not small_gemm.supports(randn(8, 256))
