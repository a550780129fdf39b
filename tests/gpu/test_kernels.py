"""The compiled kernels at real sizes, in bfloat16, against the float32 references.

Errors are relative, in the Frobenius norm. ``tests/kernels/`` has the many small cases and, where
there is a GPU, runs them compiled as well.
"""

import random

import numpy as np
import pytest
import torch

from nanovllm import kernels
from nanovllm.kernels import (
    activation,
    fused_gemm,
    norm,
    paged_decode,
    paged_prefill,
    pdl,
    reference_sampling,
    rope,
    sampling,
    small_gemm,
)
from nanovllm.kernels.normed import HeadInputs, Normed
from tests.kernels import reference
from tests.kernels.cases import (
    EPS,
    check_threshold,
    head_arguments,
    new_seed,
    randn,
    rope_case,
    sampling_case,
    threshold_case,
)
from tests.kernels.paged_case import TUNINGS, PagedCase

BF16 = torch.bfloat16
MODELS = pytest.mark.parametrize(("hq", "hkv"), [(8, 8), (16, 8), (32, 8), (40, 8), (64, 8)])
NUM_SMS = torch.cuda.get_device_properties(0).multi_processor_count


@pytest.fixture(autouse=True)
def seed() -> int:
    return new_seed()


def check(actual, expected, limit=1e-2):
    actual, expected = actual.float(), expected.float()
    error = float((actual - expected).norm() / expected.norm())
    assert error < limit, f"relative error {error:.2e}"


def in_float32(case):
    """The same arguments; what is stored goes elsewhere."""
    return {k: v.float() if torch.is_tensor(v) and v.dtype == BF16 else v for k, v in case.items()}


def check_caches(case, exact):
    """The caches hold the same, and NaN where nothing was stored."""
    for name in ("k_cache", "v_cache"):
        assert torch.equal(case[name].isnan(), exact[name].isnan())
        check(case[name].nan_to_num(), exact[name].nan_to_num())


def lengths(count, longest):
    return [random.randint(1, longest) for _ in range(count)]


@pytest.mark.parametrize("hidden", [1024, 4096, 5120])
def test_norms(hidden):
    x, residual, weight = randn(512, hidden, dtype=BF16), randn(512, hidden), randn(hidden)
    residual, weight = residual.to(BF16), weight.to(BF16)
    check(norm.rms_norm(x, weight, EPS), reference.rms_norm(x.float(), weight.float(), EPS))
    y, total = norm.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("inter", [3072, 12288])
def test_silu_mul(inter):
    gate_up = randn(512, 2 * inter, dtype=BF16)
    check(activation.silu_mul(gate_up), reference.silu_mul(gate_up.float()))


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize(("inner", "features"), [(1024, 4096), (3072, 1024), (4096, 12288)])
def test_small_gemm(tokens, inner, features):
    x, bias = randn(tokens, inner, dtype=BF16), randn(features, dtype=BF16)
    weight = (randn(features, inner) * inner**-0.5).to(BF16)
    normed = Normed(x)
    check(small_gemm.linear(normed, weight), reference.linear(x, weight))
    check(small_gemm.linear(normed, weight, bias), reference.linear(x, weight, bias))
    check(small_gemm.linear(normed, weight, gated=True), reference.linear_silu_mul(x, weight))
    behind = Normed(x, after_all_reduce=True)
    assert small_gemm._prefetch_length(weight) > 0
    for gated in (False, True):
        same = [small_gemm.linear(each, weight, gated=gated) for each in (normed, behind)]
        assert torch.equal(*same)


@pytest.mark.parametrize("tokens", [1, 2, 5, 8])
@pytest.mark.parametrize(("inner", "hidden"), [(3072, 1024), (4096, 4096), (5120, 5120)])
def test_a_norm_between_two_small_layers(tokens, inner, hidden):
    x, residual = randn(tokens, inner, dtype=BF16), randn(tokens, hidden, dtype=BF16)
    weight = (randn(hidden, inner) * inner**-0.5).to(BF16)
    norm_weight = randn(hidden, dtype=BF16)
    before = x, weight, None, residual, norm_weight, EPS
    expected, expected_total = reference.linear_add_norm(*before)
    normed, total = small_gemm.linear_add_norm(*before)
    check(total, expected_total)
    check(normed.materialize(), expected)
    after = (randn(6144, hidden) * hidden**-0.5).to(BF16)
    check(small_gemm.linear(normed, after), reference.linear(expected, after))
    gated = reference.linear_silu_mul(expected, after)
    check(small_gemm.linear(normed, after, gated=True), gated)


@pytest.mark.parametrize("tokens", [9, 16, 40, 100, 200, 256])
def test_linear_layers_in_pairs_and_in_parts(tokens):
    x, wide = randn(tokens, 1024, dtype=BF16), randn(tokens, 3072, dtype=BF16)
    gate_up, down = ((randn(*s) / s[1] ** 0.5).to(BF16) for s in ((6144, 1024), (1024, 3072)))
    assert fused_gemm.supports_silu_mul(x, gate_up)
    check(fused_gemm.linear_silu_mul(x, gate_up), reference.linear_silu_mul(x, gate_up))
    assert fused_gemm.supports_add_norm(wide, down, None)
    residual, norm_weight = randn(tokens, 1024, dtype=BF16), randn(1024, dtype=BF16)
    expected = reference.linear_add_norm(wide, down, None, residual, norm_weight, EPS)
    for actual, wanted in zip(
        fused_gemm.linear_add_norm(wide, down, residual, norm_weight, EPS), expected, strict=True
    ):
        check(actual, wanted)


@pytest.mark.parametrize("tokens", [9, 16, 40, 100, 300, 512])
def test_qkv_layer_with_its_heads(tokens):
    case = rope_case(tokens, 16, 8, 128, 256, BF16)
    x, weight = randn(tokens, 1024, dtype=BF16), (randn(4096, 1024) / 32).to(BF16)
    del case["qkv"]
    exact = in_float32(case)
    heads = HeadInputs(**case)
    assert fused_gemm.supports_heads(x, weight, heads)
    expected = reference.linear_norm_rope_store(
        x.float(), weight.float(), None, HeadInputs(**exact)
    )
    check(fused_gemm.linear_norm_rope_store(x, weight, None, heads), expected)
    check_caches(case, exact)


def test_linear_picks_the_kernel_for_few_rows_in_16_bits():
    F = torch.nn.functional
    weight, bias = (randn(512, 1024) / 32).to(BF16), randn(512, dtype=BF16)
    x = randn(300, 1024, dtype=BF16)
    few, some = Normed(x[:8]), Normed(x[:9])
    assert torch.equal(kernels.linear(few, weight, bias), small_gemm.linear(few, weight, bias))
    expected = small_gemm.linear(few, weight, gated=True)
    assert torch.equal(kernels.linear_silu_mul(few, weight), expected)
    expected = fused_gemm.linear_silu_mul(some.values, weight)
    assert torch.equal(kernels.linear_silu_mul(some, weight), expected)
    for y, w, b in ((x, weight, bias), (x[:1].float(), weight.float(), bias.float())):
        assert torch.equal(kernels.linear(Normed(y), w, b), F.linear(y, w, b))
        expected = activation.silu_mul(F.linear(y, w))
        assert torch.equal(kernels.linear_silu_mul(Normed(y), w), expected)


@pytest.mark.parametrize("normed_heads", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 9, 256, 257, 512, 513])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_layer_is_right_whichever_kernels_it_takes(tokens, head_dim, biased, normed_heads):
    """Residual and norm, then QKV and the heads; the norm's division may pass between them."""
    case = rope_case(tokens, 4, 2, head_dim, 16, BF16, normed_heads)
    exact = in_float32(case)
    features = case.pop("qkv").shape[1]
    del exact["qkv"]
    x, residual = randn(tokens, 512, dtype=BF16), randn(tokens, 1024, dtype=BF16)
    down, qkv = (randn(1024, 512) / 23).to(BF16), (randn(features, 1024) / 32).to(BF16)
    biases = [randn(n, dtype=BF16) if biased else None for n in (1024, features)]
    norm_weight = randn(1024, dtype=BF16)
    y, expected_total = reference.linear_add_norm(x, down, biases[0], residual, norm_weight, EPS)
    # The residual is used up, so it comes last.
    normed, total = kernels.linear_add_norm(x, down, biases[0], residual, norm_weight, EPS)
    check(total, expected_total)
    assert (normed.sum_sq is not None) == (tokens <= 8)
    q = kernels.linear_norm_rope_store(normed, qkv, biases[1], HeadInputs(**case))
    expected = reference.linear_norm_rope_store(
        y.float(), qkv.float(), biases[1], HeadInputs(**exact)
    )
    check(q, expected)
    check_caches(case, exact)


def test_large_activations_in_float16():
    """A norm whose division is still due would overflow."""
    x, residual = randn(3, 512).half(), torch.full((3, 1024), 9000.0, device="cuda").half()
    weight, norm_weight = (randn(1024, 512) / 23).half(), torch.full((1024,), 12.0).cuda().half()
    expected, _ = reference.linear_add_norm(x, weight, None, residual, norm_weight, EPS)
    normed, _ = kernels.linear_add_norm(x, weight, None, residual, norm_weight, EPS)
    check(normed.materialize(), expected)


@pytest.mark.parametrize("tokens", [5, 40, 200])
def test_beginning_early_changes_nothing(tokens, monkeypatch):
    """Chains of layers, each kernel of which begins before the one before it has ended."""
    x = randn(tokens, 1024, dtype=BF16)
    gate_up, down = ((randn(*s) / s[1] ** 0.5).to(BF16) for s in ((6144, 1024), (1024, 3072)))
    norm_weight = randn(1024, dtype=BF16)

    def chain():
        normed, total = Normed(norm.rms_norm(x, norm_weight, EPS)), x
        for _ in range(40):
            gated = kernels.linear_silu_mul(normed, gate_up)
            normed, total = kernels.linear_add_norm(gated, down, None, total, norm_weight, EPS)
        return total

    early = [chain() for _ in range(3)]
    monkeypatch.setattr(pdl, "is_hopper_or_newer", lambda: False)
    late = chain()
    assert all(torch.equal(total, late) for total in early)


@MODELS
def test_qk_norm_rope_store(hq, hkv):
    case = rope_case(700, hq, hkv, 128, 256, BF16)
    exact = in_float32(case)
    check(
        rope.qk_norm_rope_store(*head_arguments(case)),
        reference.qk_norm_rope_store(*head_arguments(exact)),
    )
    check_caches(case, exact)


@MODELS
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("num_sms", [16, 32, NUM_SMS])
@pytest.mark.parametrize(
    "context_lens", [[1], [9000], lengths(5, 4000), lengths(200, 700)], ids=len
)
def test_decode(hq, hkv, tuning, num_sms, context_lens):
    case = PagedCase(context_lens, hq, hkv, 128, 256, dtype=BF16)
    check(case.decode(num_sms, TUNINGS[tuning]), case.dense())


@pytest.mark.parametrize("tuning", TUNINGS)
def test_decode_in_a_replayed_graph(tuning):
    """One capture serves any lengths, and rows that pad the batch."""
    count, longest, block_size = 24, 3000, 256
    workspace = paged_decode.DecodeWorkspace(NUM_SMS, 16, 8, 128, "cuda", TUNINGS[tuning])
    width = -(-longest // block_size)
    k_cache, v_cache = (randn(count * width + 1, 8, block_size, 128, dtype=BF16) for _ in "kv")
    q = torch.zeros(count, 16, 128, dtype=BF16, device="cuda")
    tables = torch.zeros(count, width, dtype=torch.int32, device="cuda")
    lens = torch.ones(count, dtype=torch.int32, device="cuda")
    offsets = torch.from_numpy(paged_decode.tile_offsets(np.ones(count, dtype=np.int32))).cuda()

    def step():
        return paged_decode.paged_decode_attention(
            q, k_cache, v_cache, tables, lens, 128**-0.5, offsets, workspace
        )

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for real in (count, 3, 1, count - 5):
        new_lens = np.array(lengths(real, longest) + [1] * (count - real), dtype=np.int32)
        blocks = torch.randperm(count * width, device="cuda").view(count, width) + 1
        blocks[real:] = 0
        q.copy_(randn(count, 16, 128))
        tables.copy_(blocks)
        lens.copy_(torch.from_numpy(new_lens))
        offsets.copy_(torch.from_numpy(paged_decode.tile_offsets(new_lens)))
        out.fill_(float("nan"))
        graph.replay()
        args = (q.float(), k_cache, v_cache, tables, lens, 128**-0.5)
        check(out, reference.paged_decode_attention(*args))


@pytest.mark.parametrize("tuning", TUNINGS)
def test_decode_on_two_streams_at_once(tuning):
    """Two workspaces share no partial result and no count."""
    cases = [PagedCase(lengths(9, 5000), 16, 8, 128, 256, dtype=BF16) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    outs = [[], []]
    for _ in range(20):
        for case, stream, results in zip(cases, streams, outs, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.decode(NUM_SMS, TUNINGS[tuning]))
    torch.cuda.synchronize()
    for case, results in zip(cases, outs, strict=True):
        for result in results:
            check(result, case.dense())


@MODELS
@pytest.mark.parametrize("block_size", [256, 48])
def test_prefill(hq, hkv, block_size):
    rows = [1, 1500, 700, 64, 1]
    context = [5, 1500, 2000, 64, 1]
    case = PagedCase(context, hq, hkv, 128, block_size, rows, dtype=BF16)
    check(case.prefill(paged_prefill), case.dense())


def check_stored(case, k, v):
    """The last slots of both caches hold these rows, the very last slot the first row."""
    for cache, rows in ((case.k_cache, k), (case.v_cache, v)):
        check(cache[-1, :, -len(rows) :].flip(1).transpose(0, 1), rows)


def test_caches_beyond_2_31_elements():
    block_size, hkv, dim = 256, 8, 128
    num_blocks = 2**31 // (block_size * hkv * dim) + 10
    if torch.cuda.mem_get_info()[0] < 5 * num_blocks * block_size * hkv * dim:
        pytest.skip("not enough free GPU memory for two caches of 2^31 elements")
    case = PagedCase([300, 40], 16, hkv, dim, block_size, dtype=BF16, stale=0.0)
    small = case.k_cache, case.v_cache
    used = len(small[0])
    case.k_cache, case.v_cache = (
        torch.zeros(num_blocks, hkv, block_size, dim, dtype=BF16, device="cuda") for _ in "kv"
    )
    for large, cache in zip((case.k_cache, case.v_cache), small, strict=True):
        large[-used:] = cache
    case.tables += num_blocks - used
    for tuning in TUNINGS.values():
        check(case.decode(NUM_SMS, tuning), case.dense())
    check(case.prefill(paged_prefill), case.dense())
    inputs = rope_case(5, 16, hkv, dim, block_size, BF16)
    slots = num_blocks * block_size - 1 - torch.arange(5, device="cuda")
    inputs |= {"k_cache": case.k_cache, "v_cache": case.v_cache, "slot_mapping": slots}
    rope.qk_norm_rope_store(*head_arguments(inputs))
    _, k, v = reference.qk_norm_rope(*head_arguments(inputs))
    check_stored(case, k, v)
    for cache in (case.k_cache, case.v_cache):
        cache[-1, :, -5:] = 0
    projected = inputs.pop("qkv")
    identity = torch.eye(projected.shape[1], dtype=BF16, device="cuda")
    fused_gemm.linear_norm_rope_store(projected, identity, None, HeadInputs(**inputs))
    check_stored(case, k, v)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_sample(dtype):
    case = sampling_case(64, 151936, dtype)
    actual, expected = sampling.sample(*case), reference_sampling.sample(*case)
    greedy = case[1] == 0
    assert torch.equal(actual[greedy], expected[greedy])
    # A draw compares sums that the two round differently, so a rare one may differ.
    assert (actual != expected).sum() <= 1


@pytest.mark.parametrize("limits", ["k", "p", "kp"])
@pytest.mark.parametrize("spread", [0.6, 3.0])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_threshold(dtype, spread, limits):
    """Of flat rows, where most tokens are needed to reach top_p, and of steeper ones."""
    case = threshold_case(16, 151936, dtype, limits, spread)
    threshold = kernels.find_threshold(*case)
    check_threshold(threshold, *case, border=4e-6)
    for _ in range(3):
        again = kernels.find_threshold(*case)
        assert all(torch.equal(*pair) for pair in zip(threshold, again, strict=True))


def test_top_k_and_top_p_do_not_wait_for_the_device():
    case = threshold_case(16, 151936, BF16, "kp")
    inputs = sampling_case(16, 151936, BF16)
    kernels.sample(*inputs, kernels.find_threshold(*case))  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.sample(*inputs, kernels.find_threshold(*case))
    finally:
        torch.cuda.set_sync_debug_mode("default")
