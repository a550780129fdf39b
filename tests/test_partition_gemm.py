"""The partition's matrix product against torch; without a GPU in Triton's interpreter."""

import importlib.util
import os
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported

pytest.importorskip("triton", reason="Triton is not installed")

# ruff: noqa: E402
from nanovllm.kernels.gemm_tunings import GemmTuning, tiles_to_cut
from nanovllm.kernels.partition_gemm import GemmWorkspace, linear, linear_silu_mul

DEVICE = "cuda" if CUDA else "cpu"
# Triton's interpreter has no bfloat16 dot.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
HOPPER = not CUDA or torch.cuda.get_device_capability()[0] == 9
HAS_TMA = HOPPER and importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
TMA = pytest.param(
    True, marks=pytest.mark.skipif(not HAS_TMA, reason="needs Hopper and tensor descriptors")
)
TUNING = GemmTuning(16, 32, 16, num_warps=4, num_stages=2, group=2, tma=False)


@pytest.fixture(autouse=True)
def seed():
    """Fresh random inputs in every run; the seed is printed when a test fails."""
    value = int(os.environ.get("NANOVLLM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"NANOVLLM_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def check(actual, expected, dtype):
    """Both as one vector: the error is that of rounding float32 sums to the dtype once."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm() / expected.norm()
    # The interpreter truncates to half precision where the GPU rounds.
    assert error < {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 4e-3}[dtype]


def check_linear(workspace, tuning, rows, features, inner, dtype=torch.float32, bias=False):
    x, weight = randn(rows, inner, dtype=dtype), randn(features, inner, dtype=dtype)
    added = randn(features, dtype=dtype) if bias else None
    expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
    check(linear(x, weight, added, workspace, tuning), expected, dtype)
    assert not workspace.arrivals.any()


def check_gated(workspace, tuning, rows, features, inner, dtype=torch.float32):
    x, weight = randn(rows, inner, dtype=dtype), randn(2 * features, inner, dtype=dtype)
    gate, up = F.linear(x.double(), weight.double()).chunk(2, dim=1)
    check(linear_silu_mul(x, weight, workspace, tuning), F.silu(gate) * up, dtype)
    assert not workspace.arrivals.any()


@pytest.mark.parametrize("stream_k", [False, True])
@pytest.mark.parametrize("tma", [False, TMA])
@pytest.mark.parametrize("num_sms", [1, 5, 12, 40])
def test_linear(num_sms, tma, stream_k):
    # 12 tiles of 8 steps: several rounds, not evenly divided, one round, and idle programs.
    tuning = replace(TUNING, tma=tma, stream_k=stream_k)
    check_linear(GemmWorkspace(num_sms, DEVICE), tuning, 48, 128, 128, bias=num_sms == 5)


@pytest.mark.parametrize("stream_k", [False, True])
@pytest.mark.parametrize("tma", [False, TMA])
@pytest.mark.parametrize("num_sms", [1, 5, 12, 40])
def test_gated(num_sms, tma, stream_k):
    tuning = replace(TUNING, tma=tma, stream_k=stream_k)
    check_gated(GemmWorkspace(num_sms, DEVICE), tuning, 48, 64, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tma", [False, TMA])
def test_dtypes(dtype, tma):
    tuning = replace(TUNING, tma=tma, stream_k=True)
    workspace = GemmWorkspace(7, DEVICE)
    check_linear(workspace, tuning, 40, 96, 64, dtype, bias=True)
    check_gated(workspace, tuning, 40, 48, 64, dtype)


@pytest.mark.parametrize("tma", [False, TMA])
@pytest.mark.parametrize("turn", range(6))
def test_any_size(tma, turn):
    """Sizes that no block divides; rows of no multiple of 16 bytes go without TMA."""
    rows, features, inner = (random.randint(1, top) for top in (70, 90, 120))
    if turn % 2:
        features, inner = features // 4 * 4 + 4, inner // 4 * 4 + 4
    tuning = replace(TUNING, tma=tma, stream_k=turn < 4, group=random.choice([1, 2, 8]))
    workspace = GemmWorkspace(random.randint(1, 20), DEVICE)
    print(rows, features, inner, tuning, workspace.num_sms)
    check_linear(workspace, tuning, rows, features, inner, bias=turn % 3 == 0)
    check_gated(workspace, tuning, rows, features, inner)


def test_shares_longer_than_a_tile():
    # 11 tiles on 5 programs: the last round has 1, so that 6 are cut into 5 shares of 1.2 tiles.
    assert tiles_to_cut(11, 5) == 6
    check_linear(GemmWorkspace(5, DEVICE), replace(TUNING, stream_k=True), 16, 11 * 32, 160)


def test_tiles_in_many_shares():
    # One tile of 24 steps on 6 programs of 4 steps each.
    workspace = GemmWorkspace(6, DEVICE)
    check_linear(workspace, replace(TUNING, stream_k=True), 10, 30, 24 * 16)


def test_a_workspace_serves_one_launch_after_another():
    workspace = GemmWorkspace(7, DEVICE)
    for _ in range(3):
        rows, features = random.randint(1, 60), random.randint(1, 100)
        check_linear(workspace, replace(TUNING, stream_k=True), rows, features, 96)


def test_stream_k_is_deterministic():
    workspace = GemmWorkspace(7, DEVICE)
    x, weight = randn(48, 256), randn(128, 256)
    tuning = replace(TUNING, stream_k=True)
    first = linear(x, weight, None, workspace, tuning)
    for _ in range(20 if CUDA else 1):
        assert torch.equal(linear(x, weight, None, workspace, tuning), first)


def test_sums_are_float32():
    """Many small terms beside a large one, which sums in half precision would lose."""
    inner = 512
    x = torch.ones(4, inner, device=DEVICE, dtype=torch.float16)
    weight = torch.full((8, inner), 1 / 4, device=DEVICE, dtype=torch.float16)
    weight[:, 0] = 1024
    for stream_k in (False, True):
        tuning = replace(TUNING, stream_k=stream_k)
        out = linear(x, weight, None, GemmWorkspace(3, DEVICE), tuning)
        assert (out - (1024 + (inner - 1) / 4)).abs().max() <= 1  # the spacing of float16 here


def test_strided_input():
    x, weight = randn(128, 40).T, randn(96, 256)[:, ::2]
    out = linear(x, weight, None, GemmWorkspace(4, DEVICE), TUNING)
    check(out, x.double() @ weight.double().T, torch.float32)


@pytest.mark.parametrize("tma", [False, TMA])
def test_input_inside_a_buffer(tma):
    """Begins 4 bytes into an allocation, where TMA cannot begin."""
    x, weight = randn(20 * 64 + 1)[1:].view(20, 64), randn(32, 64)
    out = linear(x, weight, None, GemmWorkspace(4, DEVICE), replace(TUNING, tma=tma))
    check(out, x.double() @ weight.double().T, torch.float32)


def test_no_rows():
    workspace = GemmWorkspace(4, DEVICE)
    assert linear(randn(0, 64), randn(32, 64), None, workspace, TUNING).shape == (0, 32)
    assert linear_silu_mul(randn(0, 64), randn(32, 64), workspace, TUNING).shape == (0, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ws: linear(randn(2, 64), randn(8, 32), None, ws, TUNING), r"\[M, 64\]"),
        (lambda ws: linear(randn(2, 64), randn(8, 64).half(), None, ws, TUNING), "weight is"),
        (lambda ws: linear(randn(2, 64), randn(8, 64), randn(4), ws, TUNING), r"bias is \[4\]"),
        (lambda ws: linear(randn(2, 64), randn(8, 64), randn(8).half(), ws, TUNING), "bias is"),
        (lambda ws: linear_silu_mul(randn(2, 64), randn(7, 64), ws, TUNING), "has 7 rows"),
    ],
)
def test_refused_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(GemmWorkspace(2, DEVICE))


def test_refused_workspace():
    with pytest.raises(ValueError, match="num_sms is 0"):
        GemmWorkspace(0, DEVICE)
