"""SiLU of the gate times up: the kernel and its reference against torch."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import activation, reference
from tests.kernels.cases import close, randn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inter", [40, 1024, 1536])
def test_silu_mul(poison, inter, dtype):
    gate_up = randn(3, 2 * inter, dtype=dtype) * 4
    expected = F.silu(gate_up[:, :inter].float()) * gate_up[:, inter:].float()
    close(reference.silu_mul(gate_up), expected.to(dtype), dtype)
    close(activation.silu_mul(gate_up), expected.to(dtype), dtype)
