"""Between QKV and attention: norm of the heads, rotation, and the store into the cache."""

import pytest
import torch
import torch.nn.functional as F

from nanovllm.kernels import reference, rope
from tests.kernels.cases import (
    EPS,
    check_caches,
    close,
    head_arguments,
    rope_case,
    with_caches_of_its_own,
)

NORMED = pytest.mark.parametrize("normed", [True, False], ids=["norms", "no norms"])


@NORMED
def test_rope_reference_is_transformers(normed):
    case = rope_case(6, 4, 2, 32, 16, normed=normed)
    q, k, v = reference.qk_norm_rope(*head_arguments(case))
    halves = case["cos_sin"][case["positions"]].chunk(2, dim=1)
    cos, sin = (torch.cat([x, x], dim=1)[:, None] for x in halves)
    raw = case["qkv"].view(6, 8, 32)

    def expected(x, weight):
        x = F.rms_norm(x, (32,), weight, EPS) if normed else x
        rotated = torch.cat([-x[..., 16:], x[..., :16]], dim=-1)
        return x * cos + rotated * sin

    close(q, expected(raw[:, :4], case["q_weight"]))
    close(k, expected(raw[:, 4:6], case["k_weight"]))
    assert torch.equal(v, raw[:, 6:])


@NORMED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("hq", "hkv", "dim", "block_size"),
    [(16, 8, 128, 256), (4, 4, 64, 16), (10, 2, 64, 48), (3, 1, 32, 64), (8, 1, 256, 16)],
)
def test_qk_norm_rope_store(poison, hq, hkv, dim, block_size, dtype, normed):
    case = rope_case(9, hq, hkv, dim, block_size, dtype, normed)
    expected = with_caches_of_its_own(case)
    q = rope.qk_norm_rope_store(*head_arguments(case))
    close(q, reference.qk_norm_rope_store(*head_arguments(expected)), dtype)
    check_caches(case, expected, dtype)


def test_rope_reads_strided_rows(poison):
    case = rope_case(4, 4, 2, 64, 16)
    expected = with_caches_of_its_own(case)
    wide = torch.cat([case["qkv"], case["qkv"]], dim=1)
    case["qkv"] = wide[:, : case["qkv"].shape[1]]
    q = rope.qk_norm_rope_store(*head_arguments(case))
    assert torch.equal(q, rope.qk_norm_rope_store(*head_arguments(expected)))
    check_caches(case, expected)
