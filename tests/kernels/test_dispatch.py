"""``nanovllm.kernels`` itself: the form by device, import without Triton, empty batches."""

import subprocess
import sys

import torch

from nanovllm import kernels
from nanovllm.kernels import (
    activation,
    gpu,
    norm,
    reference_sampling,
    sampling,
    small_gemm,
)
from nanovllm.kernels.normed import HeadInputs, Normed
from tests.kernels import reference
from tests.kernels.cases import (
    DEVICE,
    EPS,
    check_caches,
    check_threshold,
    close,
    randn,
    rope_case,
    sampling_case,
    threshold_case,
    with_caches_of_its_own,
)


def test_operations_are_their_references_on_any_device():
    x, weight, residual = randn(3, 64), randn(64), randn(3, 64)
    close(kernels.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))
    y, total = kernels.add_rms_norm(x, residual, weight, EPS)
    close(y, reference.rms_norm(x + residual, weight, EPS))
    assert torch.equal(total, x + residual)
    close(kernels.silu_mul(x), reference.silu_mul(x))
    ids, last_tokens = torch.tensor([4, -1, -2], device=DEVICE), randn(2).long().abs()
    resolved = kernels.resolve_tokens(ids, last_tokens)
    assert torch.equal(resolved, reference.resolve_tokens(ids, last_tokens))
    case = sampling_case(2, 50)
    assert torch.equal(kernels.sample(*case), reference_sampling.sample(*case))
    case = threshold_case(6, 50, torch.float32, "kp")
    check_threshold(kernels.find_threshold(*case), *case)


def test_linear_layers_are_their_references_on_any_device():
    """In float32, which no fused kernel takes."""
    x, weight, bias, residual = randn(3, 64), randn(48, 64) / 8, randn(48), randn(3, 48)
    close(kernels.linear(Normed(x), weight, bias), reference.linear(x, weight, bias))
    silu = kernels.linear_silu_mul(kernels.Normed(x), weight)
    close(silu, reference.linear_silu_mul(x, weight))
    for b in (bias, None):
        expected = reference.linear_add_norm(x, weight, b, residual, bias, EPS)
        normed, total = kernels.linear_add_norm(x, weight, b, residual.clone(), bias, EPS)
        close(normed.materialize(), expected[0])
        close(total, expected[1])


def test_the_qkv_layer_is_its_reference_on_any_device():
    case = rope_case(3, 2, 1, 32, 16)
    del case["qkv"]
    expected = with_caches_of_its_own(case)
    x, weight = randn(3, 64), randn(128, 64) / 8
    q = kernels.linear_norm_rope_store(kernels.Normed(x), weight, None, HeadInputs(**case))
    close(q, reference.linear_norm_rope_store(x, weight, None, HeadInputs(**expected)))
    check_caches(case, expected)


def test_import_without_triton():
    code = "import sys, nanovllm.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_torch_that_cannot_limit_cublas_is_warned_of_once(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "can_limit_cublas_sms", lambda: False)
    gpu._warn_that_sms_are_not_limited.cache_clear()
    with gpu.cublas_sm_limit(132, 132):
        pass
    assert not caplog.records
    for _ in range(2):
        with gpu.cublas_sm_limit(96, 132):
            pass
    (record,) = caplog.records
    assert f"torch {torch.__version__} cannot tell cuBLAS" in record.getMessage()


def test_empty_batches():
    assert norm.rms_norm(randn(0, 64), randn(64), EPS).shape == (0, 64)
    assert activation.silu_mul(randn(0, 64)).shape == (0, 32)
    assert sampling.sample(*sampling_case(0, 8)).shape == (0,)
    assert small_gemm.linear(Normed(randn(0, 256)), randn(8, 256)).shape == (0, 8)
