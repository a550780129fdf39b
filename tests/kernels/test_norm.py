"""RMS norm, alone and after an addition: the kernel against its reference, that against torch."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import norm, reference
from tests.kernels.cases import EPS, HALF, close, randn


def test_rms_norm_reference_is_torchs():
    x, weight = randn(5, 3, 48), randn(48)
    close(reference.rms_norm(x, weight, EPS), F.rms_norm(x, (48,), weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 100), (2, 3, 1024)])
def test_rms_norm(poison, shape, dtype):
    x, weight = randn(*shape, dtype=dtype) * 3, randn(shape[-1], dtype=dtype)
    close(norm.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("module", [reference, norm])
def test_add_rms_norm_is_the_sum_and_then_the_norm(poison, module, dtype):
    x, residual, weight = (randn(7, 96, dtype=dtype) for _ in range(3))
    y, total = module.add_rms_norm(x, residual, weight[0], EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, module.rms_norm(x + residual, weight[0], EPS))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_are_added_up_before_the_norm(poison, num_parts, dtype):
    parts = randn(num_parts, 7, 96)
    residual, weight = randn(7, 96, dtype=dtype), randn(96, dtype=dtype)
    y, total = norm.add_parts_rms_norm(parts, residual, weight, EPS)
    close(total, (parts.sum(0) + residual.float()).to(dtype), dtype)
    assert torch.equal(y, norm.rms_norm(total, weight, EPS))
