"""Linear layers for tens to hundreds of rows, fused with what follows them."""

import pytest
import torch

from nanovllm.kernels import fused_gemm
from nanovllm.kernels.normed import HeadInputs
from tests.kernels import reference
from tests.kernels.cases import (
    EPS,
    HALF,
    check_caches,
    close,
    randn,
    rope_case,
    with_caches_of_its_own,
)

ROWS = pytest.mark.parametrize("rows", [0, 3, 16, 50, 130])


@pytest.fixture(params=[132, 3], ids=["one program an SM", "several"])
def num_sms(request, monkeypatch) -> int:
    """SMs of the device; with few of them tiles are large and steps short."""
    monkeypatch.setattr(fused_gemm, "usable_sms", lambda device: request.param)
    return request.param


@pytest.mark.parametrize("dtype", HALF)
@ROWS
@pytest.mark.parametrize(("inner", "inter"), [(128, 64), (384, 192)])
def test_linear_silu_mul(poison, num_sms, rows, inner, inter, dtype):
    x = randn(rows, inner, dtype=dtype)
    weight = randn(2 * inter, inner, dtype=dtype) * inner**-0.5
    expected = reference.linear_silu_mul(x, weight)
    close(fused_gemm.linear_silu_mul(x, weight), expected, dtype)


@pytest.mark.parametrize("dtype", HALF)
@ROWS
@pytest.mark.parametrize(("hq", "hkv"), [(2, 1), (4, 2)])
@pytest.mark.parametrize("normed", [True, False], ids=["norms", "no norms"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
def test_linear_norm_rope_store(poison, num_sms, rows, hq, hkv, dtype, normed, biased):
    case = rope_case(rows, hq, hkv, 128, 16, dtype, normed)
    features = case.pop("qkv").shape[1]
    weight = randn(features, 256, dtype=dtype) / 16
    bias = randn(features, dtype=dtype) if biased else None
    x = randn(rows, 256, dtype=dtype)
    expected = with_caches_of_its_own(case)
    q = fused_gemm.linear_norm_rope_store(x, weight, bias, HeadInputs(**case))
    close(q, reference.linear_norm_rope_store(x, weight, bias, HeadInputs(**expected)), dtype)
    check_caches(case, expected, dtype)


def test_rows_need_not_be_contiguous(poison):
    x, weight = randn(20, 256).half(), randn(128, 128).half() / 11
    expected = fused_gemm.linear_silu_mul(x[:, :128].contiguous(), weight)
    assert torch.equal(fused_gemm.linear_silu_mul(x[:, :128], weight), expected)


def test_which_pairs_it_is_fast_for():
    x, small = randn(100, 256, dtype=torch.bfloat16), randn(512, 256, dtype=torch.bfloat16)
    large = torch.empty(24576, 4096, dtype=torch.bfloat16, device="meta")
    case = rope_case(100, 2, 1, 128, 16, torch.bfloat16)
    del case["qkv"]
    heads, short = HeadInputs(**case), HeadInputs(**{**case, "cos_sin": case["cos_sin"][:, :64]})
    assert fused_gemm.supports_silu_mul(x, small)
    assert fused_gemm.supports_heads(x, small, heads)
    assert not fused_gemm.supports_silu_mul(x, small.float())
    assert not fused_gemm.supports_silu_mul(x, small[:500])
    assert not fused_gemm.supports_silu_mul(x, small[:, :200])
    assert not fused_gemm.supports_silu_mul(x, large)
    assert not fused_gemm.supports_silu_mul(x.repeat(3, 1), small)
    assert not fused_gemm.supports_heads(x, small, short)
    assert not fused_gemm.supports_heads(x.repeat(6, 1), small, heads)


@pytest.mark.parametrize("dtype", HALF)
@ROWS
@pytest.mark.parametrize(("inner", "features"), [(512, 64), (1536, 128)])
def test_linear_add_norm(poison, num_sms, rows, inner, features, dtype):
    x, residual = randn(rows, inner, dtype=dtype), randn(rows, features, dtype=dtype)
    weight = randn(features, inner, dtype=dtype) * inner**-0.5
    norm_weight = randn(features, dtype=dtype)
    args = residual, norm_weight, EPS
    expected, expected_total = reference.linear_add_norm(x, weight, None, *args)
    y, total = fused_gemm.linear_add_norm(x, weight, *args)
    close(total, expected_total, dtype)
    close(y, expected, dtype)
    parts = fused_gemm.linear_parts(x, weight)
    assert parts.shape == (2 if num_sms < 132 and rows else 4, rows, features)


def test_which_splits_it_is_fast_for():
    x, small = randn(256, 512, dtype=torch.bfloat16), randn(512, 512, dtype=torch.bfloat16)
    large = torch.empty(4096, 12288, dtype=torch.bfloat16, device="meta")
    assert fused_gemm.supports_add_norm(x, small, None)
    assert not fused_gemm.supports_add_norm(x, small, small[0])
    assert not fused_gemm.supports_add_norm(x.repeat(2, 1), small, None)
    for weight in (small.float(), small[:500], small[:, :384], large):
        assert not fused_gemm.supports_add_norm(x, weight, None)
