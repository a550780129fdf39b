"""``nanovllm.kernels`` itself: the form by device, import without Triton, empty batches."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from nanovllm import kernels
from nanovllm.kernels import activation, norm, reference, sampling, small_gemm
from nanovllm.kernels.normed import Normed
from tests.kernels.cases import EPS, cut_case, randn, rope_case, sampling_case


def test_dispatch_by_device():
    x, weight = randn(3, 64), randn(64)
    assert torch.equal(
        kernels.rms_norm(x.cpu(), weight.cpu(), EPS), reference.rms_norm(x.cpu(), weight.cpu(), EPS)
    )
    case = rope_case(3, 2, 1, 32, 16)
    for _ in range(2):  # the first call on CUDA imports; the names must still be functions
        kernels.rms_norm(x, weight, EPS)
        kernels.add_rms_norm(x, x, weight, EPS)
        kernels.silu_mul(x)
        assert torch.equal(kernels.linear(x, x, weight[:3]), F.linear(x, x, weight[:3]))
        silu = kernels.linear_silu_mul(kernels.Normed(x), x[:2])
        assert torch.equal(silu, kernels.silu_mul(F.linear(x, x[:2])))
        residual = x[:, :3].clone()
        expected = kernels.add_rms_norm(F.linear(x, x), residual, weight[:3], EPS)
        normed, total = kernels.linear_add_norm(x, x, None, residual, weight[:3], EPS)
        assert torch.equal(normed.divided(), expected[0])
        assert torch.equal(total, expected[1])
        qkv = case.pop("qkv")
        identity = torch.eye(qkv.shape[1], device=qkv.device)
        q = kernels.linear_norm_rope_store(
            kernels.Normed(qkv), identity, None, kernels.HeadInputs(**case)
        )
        case["qkv"] = qkv
        expected = reference.qk_norm_rope_store(**case)
        torch.testing.assert_close(q, expected, rtol=1e-3, atol=1e-3)
        kernels.sample(*sampling_case(2, 50))
        kernels.find_cut(*cut_case(6, 50, torch.float32, "kp"))


def test_import_without_triton():
    code = "import sys, nanovllm.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("rows", [0])
def test_empty_batches(rows):
    assert norm.rms_norm(randn(rows, 64), randn(64), EPS).shape == (0, 64)
    assert activation.silu_mul(randn(rows, 64)).shape == (0, 32)
    assert sampling.sample(*sampling_case(rows, 8)).shape == (0,)
    assert small_gemm.linear(Normed(randn(rows, 256)), randn(8, 256)).shape == (0, 8)
