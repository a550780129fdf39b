"""The kernels: each Triton form against its reference, the references against plain torch.

Without a GPU the Triton kernels run in Triton's interpreter, on the CPU.
"""

import importlib.util
import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel module is imported

triton = pytest.importorskip("triton", reason="Triton is not installed")

# ruff: noqa: E402
from nanovllm import kernels
from nanovllm.kernels import (
    activation,
    likely,
    norm,
    paged_decode,
    paged_prefill,
    reference,
    rope,
    sampling,
    small_gemm,
    tokens,
)

DEVICE = "cuda" if CUDA else "cpu"
HOPPER = CUDA and torch.cuda.get_device_capability() >= (9, 0)
# Triton's interpreter truncates to bfloat16 where the GPU rounds, and has no bfloat16 dot.
HALF = [torch.float16, *([torch.bfloat16] if CUDA else [])]
EPS = 1e-6


@pytest.fixture(autouse=True)
def seed():
    """Fresh random inputs in every run; the seed is printed when a test fails."""
    value = int(os.environ.get("NANOVLLM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"NANOVLLM_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


@pytest.fixture
def poison(monkeypatch):
    """Let torch.empty and torch.empty_like return NaN, or -1 for integers, not chance zeros."""

    def filled(function):
        def call(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else -1)

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(actual, expected, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class PagedCase:
    """Random sequences in a paged cache; unused slots, all of block 0 too, hold ``stale``."""

    def __init__(
        self,
        context_lens,
        hq,
        hkv,
        dim,
        block_size,
        query_lens=None,
        dtype=torch.float32,
        stale=float("nan"),
    ):
        self.context_lens, self.scale = context_lens, dim**-0.5
        needed = [-(-length // block_size) for length in context_lens]
        blocks = torch.randperm(sum(needed) + 2, device=DEVICE).to(torch.int32) + 1
        shape = (sum(needed) + 3, hkv, block_size, dim)
        self.k_cache, self.v_cache = (
            torch.full(shape, stale, dtype=dtype, device=DEVICE) for _ in "kv"
        )
        # Entries past a sequence's last block are out of range: no kernel may follow them.
        self.tables = torch.full(
            (len(needed), max(needed) + 1), 2**30, dtype=torch.int32, device=DEVICE
        )
        self.keys, self.values = [], []
        used = 0
        for n, (length, count) in enumerate(zip(context_lens, needed, strict=True)):
            self.tables[n, :count] = blocks[used : used + count]
            used += count
            token = torch.arange(length, device=DEVICE)
            slots = self.tables[n].long()[token // block_size] * block_size + token % block_size
            k, v = randn(length, hkv, dim, dtype=dtype), randn(length, hkv, dim, dtype=dtype)
            reference.store_kv(k, v, self.k_cache, self.v_cache, slots)
            self.keys.append(k)
            self.values.append(v)
        self.query_lens = query_lens or [1] * len(needed)
        self.q = randn(sum(self.query_lens), hq, dim, dtype=dtype)
        self.lens = torch.tensor(context_lens, dtype=torch.int32, device=DEVICE)
        starts = np.cumsum([0, *self.query_lens])
        self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=DEVICE)

    def cache(self):
        return self.q, self.k_cache, self.v_cache, self.tables

    def dense(self):
        """The answer by torch's own attention, sequence by sequence."""
        out = []
        for q, k, v in zip(self.q.split(self.query_lens), self.keys, self.values, strict=True):
            q, k, v = (x.float().transpose(0, 1)[None] for x in (q, k, v))
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=DEVICE)
            out.append(
                F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=visible.tril(k.shape[2] - q.shape[2]),
                    scale=self.scale,
                    enable_gqa=True,
                )[0].transpose(0, 1)
            )
        return torch.cat(out).to(self.q.dtype)

    def decode(self, num_sms, tuning=None, **changes):
        tuning = replace(tuning or paged_decode.PLAIN, **changes)
        heads, kv_heads, dim = self.q.shape[1], self.k_cache.shape[1], self.q.shape[2]
        workspace = paged_decode.DecodeWorkspace(num_sms, heads, kv_heads, dim, DEVICE, tuning)
        offsets = paged_decode.tile_offsets(np.array(self.context_lens))
        return paged_decode.paged_decode_attention(
            *self.cache(), self.lens, self.scale, torch.from_numpy(offsets).to(DEVICE), workspace
        )

    def prefill(self, module):
        return module.paged_prefill_attention(
            *self.cache(), self.cu_seqlens, self.lens, max(self.query_lens), self.scale
        )


# ------------------------------------------------------------------ normalisation and activation


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inter", [40, 1024, 1536])
def test_silu_mul(poison, inter, dtype):
    gate_up = randn(3, 2 * inter, dtype=dtype) * 4
    expected = F.silu(gate_up[:, :inter].float()) * gate_up[:, inter:].float()
    close(reference.silu_mul(gate_up), expected.to(dtype), dtype)
    close(activation.silu_mul(gate_up), expected.to(dtype), dtype)


# ------------------------------------------------------------------ linear layers


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(("inner", "features"), [(256, 8), (768, 100), (1024, 24)])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_small_gemm(poison, count, inner, features, dtype):
    x, bias = randn(count, inner, dtype=dtype), randn(2 * features, dtype=dtype)
    weight = randn(2 * features, inner, dtype=dtype) * inner**-0.5
    for args in ((x, weight), (x, weight, bias)):
        close(small_gemm.linear(*args), reference.linear(*args), dtype)
    expected = reference.linear_silu_mul(x, weight)
    close(small_gemm.linear_silu_mul(x, weight), expected, dtype)


def test_row_counts_meet_every_form_of_the_small_gemm():
    forms = {triton.next_power_of_2(count) for count in range(1, small_gemm.MAX_ROWS + 1)}
    assert {triton.next_power_of_2(count) for count in small_gemm.row_counts()} == forms


def test_linear_references_are_torchs():
    x, weight, bias = randn(5, 96), randn(40, 96), randn(40)
    close(reference.linear(x, weight, bias), F.linear(x, weight, bias))
    close(reference.linear_silu_mul(x, weight), reference.silu_mul(F.linear(x, weight)))


def test_small_gemm_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="9 rows"):
        small_gemm.linear(randn(9, 256), randn(8, 256))
    with pytest.raises(ValueError, match="320 columns"):
        small_gemm.linear(randn(1, 320), randn(8, 320))
    assert small_gemm.supports(randn(8, 256, dtype=torch.bfloat16))
    for x in (randn(9, 256), randn(8, 320)):
        assert not small_gemm.supports(x.half())
    assert not small_gemm.supports(randn(8, 256))


# ------------------------------------------------------------------ between QKV and attention


def rope_case(num_tokens, hq, hkv, dim, block_size, dtype=torch.float32):
    angles = torch.outer(torch.arange(50), 10000.0 ** -(torch.arange(0, dim, 2) / dim))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(DEVICE)
    shape = (num_tokens // block_size + 3, hkv, block_size, dim)
    caches = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in "kv"]
    return {
        "qkv": randn(num_tokens, (hq + 2 * hkv) * dim, dtype=dtype) * 2,
        "q_weight": randn(dim, dtype=dtype),
        "k_weight": randn(dim, dtype=dtype),
        "eps": EPS,
        "cos_sin": cos_sin,
        "positions": torch.randint(0, 50, (num_tokens,), device=DEVICE),
        "slot_mapping": torch.randperm(shape[0] * block_size, device=DEVICE)[:num_tokens],
        "k_cache": caches[0],
        "v_cache": caches[1],
        "num_q_heads": hq,
        "num_kv_heads": hkv,
    }


def without_cache(case):
    return {k: v for k, v in case.items() if k not in ("slot_mapping", "k_cache", "v_cache")}


def test_rope_reference_is_transformers():
    case = rope_case(6, 4, 2, 32, 16)
    q, k, v = reference.qk_norm_rope(**without_cache(case))
    halves = case["cos_sin"][case["positions"]].chunk(2, dim=1)
    cos, sin = (torch.cat([x, x], dim=1)[:, None] for x in halves)
    raw = case["qkv"].view(6, 8, 32)

    def expected(x, weight):
        x = F.rms_norm(x, (32,), weight, EPS)
        rotated = torch.cat([-x[..., 16:], x[..., :16]], dim=-1)
        return x * cos + rotated * sin

    close(q, expected(raw[:, :4], case["q_weight"]))
    close(k, expected(raw[:, 4:6], case["k_weight"]))
    assert torch.equal(v, raw[:, 6:])


def test_store_kv_reference_places_every_token():
    k, v = randn(5, 2, 8), randn(5, 2, 8)
    caches = torch.zeros(3, 2, 4, 8, device=DEVICE), torch.zeros(3, 2, 4, 8, device=DEVICE)
    slots = [11, 0, 5, 6, 3]
    reference.store_kv(k, v, *caches, torch.tensor(slots, device=DEVICE))
    for t, slot in enumerate(slots):
        for new, cache in zip((k, v), caches, strict=True):
            assert torch.equal(cache[slot // 4, :, slot % 4], new[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("hq", "hkv", "dim", "block_size"),
    [(16, 8, 128, 256), (4, 4, 64, 16), (10, 2, 64, 48), (3, 1, 32, 64), (8, 1, 256, 16)],
)
def test_qk_norm_rope_store(poison, hq, hkv, dim, block_size, dtype):
    case = rope_case(9, hq, hkv, dim, block_size, dtype)
    expected = {**case, "k_cache": case["k_cache"].clone(), "v_cache": case["v_cache"].clone()}
    q = rope.qk_norm_rope_store(**case)
    close(q, reference.qk_norm_rope_store(**expected), dtype)
    for name in ("k_cache", "v_cache"):
        # NaN where nothing was stored, in both.
        assert torch.equal(case[name].isnan(), expected[name].isnan())
        close(case[name].nan_to_num(), expected[name].nan_to_num(), dtype)
    for actual, wanted in zip(
        rope.qk_norm_rope(**without_cache(case)),
        reference.qk_norm_rope(**without_cache(case)),
        strict=True,
    ):
        close(actual, wanted, dtype)


def test_rope_reads_strided_rows(poison):
    case = rope_case(4, 4, 2, 64, 16)
    expected = rope.qk_norm_rope(**without_cache(case))
    wide = torch.cat([case["qkv"], case["qkv"]], dim=1)
    case["qkv"] = wide[:, : case["qkv"].shape[1]]
    for actual, wanted in zip(rope.qk_norm_rope(**without_cache(case)), expected, strict=True):
        assert torch.equal(actual, wanted)


# ------------------------------------------------------------------ attention

RAGGED = [1, 200, 64, 65, 17]


def test_attention_references_are_dense_attention():
    case = PagedCase([1, 37, 16], 6, 2, 32, 16)
    close(reference.paged_decode_attention(*case.cache(), case.lens, case.scale), case.dense())
    case = PagedCase([1, 37, 16], 6, 2, 32, 16, [1, 20, 16])
    close(case.prefill(reference), case.dense())
    case = PagedCase([1, 37, 16], 6, 2, 32, 16, [1, 37, 16])
    k, v = torch.cat(case.keys), torch.cat(case.values)
    out = reference.causal_attention(case.q, k, v, case.cu_seqlens, case.scale)
    close(out, case.dense())


TUNINGS = {"plain": paged_decode.PLAIN}
if importlib.util.find_spec("triton.tools.tensor_descriptor") and (HOPPER or not CUDA):
    TUNINGS |= {"tma": paged_decode.TMA, "keys_first": paged_decode.KEYS_FIRST}
TUNING = pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)
# With TMA, stale slots must be finite: see the kernel.
STALE = 1000.0


@TUNING
@pytest.mark.parametrize("block_size", [256, 64, 48, 16])
@pytest.mark.parametrize("num_sms", [1, 3, 40])
def test_decode_of_ragged_lengths(poison, block_size, num_sms, tuning):
    stale = STALE if tuning.tma else float("nan")
    case = PagedCase(RAGGED, 4, 2, 64, block_size, stale=stale)
    close(case.decode(num_sms, tuning, ctas_per_sm=1), case.dense())


@TUNING
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_decode_of_grouped_heads(poison, group, dim, tuning):
    case = PagedCase([130, 3], 2 * group, 2, dim, 64, stale=STALE)
    close(case.decode(2, tuning), case.dense())


@TUNING
@pytest.mark.parametrize("lengths", [[1], [1000], [1, 1, 1, 1], [640, 1], [63, 64, 65, 128, 129]])
@pytest.mark.parametrize("programs", [1, 2, 3, 4, 7, 30])
def test_decode_shares(poison, lengths, programs, tuning):
    """Few long sequences, many short ones, more programs than tiles and fewer."""
    case = PagedCase(lengths, 2, 1, 32, 64, stale=STALE)
    close(case.decode(programs, tuning, ctas_per_sm=1), case.dense())


def test_decode_of_more_sequences_than_are_searched_at_once(poison):
    case = PagedCase([1, 2, 70] * 400, 1, 1, 32, 64)
    close(case.decode(3, ctas_per_sm=1), case.dense())


def test_decode_joins_more_partials_than_one_chunk_holds(poison):
    case = PagedCase([3000, 5], 8, 1, 32, 64)
    close(case.decode(45, ctas_per_sm=1, num_warps=1), case.dense())


@TUNING
@pytest.mark.parametrize("dtype", HALF)
def test_decode_in_16_bits(poison, dtype, tuning):
    case = PagedCase(RAGGED, 4, 2, 64, 256, dtype=dtype, stale=STALE)
    close(case.decode(2, tuning), case.dense(), dtype)


@TUNING
def test_a_workspace_serves_changing_lengths(tuning):
    """As in a replayed graph: same shapes and buffers, other lengths."""
    workspace = paged_decode.DecodeWorkspace(5, 2, 1, 32, DEVICE, tuning)
    for lengths in ([500, 3], [1, 1], [64, 700], [1, 65]):
        case = PagedCase(lengths, 2, 1, 32, 64, stale=STALE)
        offsets = torch.from_numpy(paged_decode.tile_offsets(np.array(lengths))).to(DEVICE)
        out = paged_decode.paged_decode_attention(
            *case.cache(), case.lens, case.scale, offsets, workspace
        )
        close(out, case.dense())
        assert not workspace.arrivals.any()  # or the next launch would join too early


@TUNING
def test_sequences_without_tiles_are_skipped(tuning):
    """The padding of a captured step; also a step of nothing else."""
    lengths = [300, 5, 64, 129]
    for count in (4, 3, 0):
        case = PagedCase(lengths, 4, 2, 32, 64, stale=STALE)
        tiles = paged_decode.tile_offsets(np.array(lengths))
        tiles[count:] = tiles[count]
        workspace = paged_decode.DecodeWorkspace(5, 4, 2, 32, DEVICE, tuning)
        out = paged_decode.paged_decode_attention(
            *case.cache(), case.lens, case.scale, torch.from_numpy(tiles).to(DEVICE), workspace
        )
        close(out[:count], case.dense()[:count])
        assert not workspace.arrivals.any()


def test_a_workspace_serves_either_tuning(monkeypatch):
    """The batch decides: few sequences and many need different grids."""
    if "tma" not in TUNINGS:
        pytest.skip("Triton without descriptors")
    monkeypatch.setattr(paged_decode, "_has_tma", lambda: not CUDA or HOPPER)
    workspace = paged_decode.DecodeWorkspace(90, 2, 1, 32, DEVICE)
    for count in (1, 100, 90, 91):
        lengths = [random.randint(1, 200) for _ in range(count)]
        case = PagedCase(lengths, 2, 1, 32, 64, stale=STALE)
        offsets = torch.from_numpy(paged_decode.tile_offsets(np.array(lengths))).to(DEVICE)
        out = paged_decode.paged_decode_attention(
            *case.cache(), case.lens, case.scale, offsets, workspace
        )
        close(out, case.dense())
        assert not workspace.arrivals.any()


def test_tuning_for_partitions_and_small_batches(monkeypatch):
    tuning_for, plain, tma = paged_decode.tuning_for, paged_decode.PLAIN, paged_decode.TMA
    monkeypatch.setattr(paged_decode, "_has_tma", lambda: True)
    assert tuning_for(132, 8 * 512, 4) is plain
    assert tuning_for(132, 8, 4) is tma
    assert tuning_for(32, 8 * 512, 4) is tma
    assert tuning_for(132, 8 * 512, 5) is paged_decode.KEYS_FIRST
    monkeypatch.setattr(paged_decode, "_has_tma", lambda: False)
    assert tuning_for(32, 8, 2) is plain
    assert tuning_for(32, 8, 5) is plain


def test_tile_offsets():
    offsets = paged_decode.tile_offsets(np.array([1, 64, 65, 200], dtype=np.int32))
    assert offsets.dtype == np.int32
    assert offsets.tolist() == [0, 1, 2, 4, 8]
    with pytest.raises(ValueError, match="context_lens has 0"):
        paged_decode.tile_offsets(np.array([5, 0]))


def test_workspace_rejects_what_it_cannot_serve():
    with pytest.raises(ValueError, match="num_sms is 0"):
        paged_decode.DecodeWorkspace(0, 4, 2, 64, DEVICE)
    with pytest.raises(ValueError, match="num_q_heads 5"):
        paged_decode.DecodeWorkspace(4, 5, 2, 64, DEVICE)
    with pytest.raises(ValueError, match="head_dim is 80"):
        paged_decode.DecodeWorkspace(4, 4, 2, 80, DEVICE)


@pytest.mark.parametrize("block_size", [256, 64, 48, 16])
@pytest.mark.parametrize(
    ("context", "rows"),
    [
        ([5], [5]),
        ([1, 100, 33], [1, 100, 33]),
        ([150, 70, 1, 129], [22, 70, 1, 1]),  # cached prefixes and a decode row
        ([260], [200]),
    ],
)
def test_prefill(poison, context, rows, block_size):
    case = PagedCase(context, 2, 1, 32, block_size, rows)
    close(case.prefill(paged_prefill), case.dense())


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_prefill_of_grouped_heads(poison, group, dim):
    case = PagedCase([90, 20], 2 * group, 2, dim, 64, [30, 20])
    close(case.prefill(paged_prefill), case.dense())


@pytest.mark.parametrize("dtype", HALF)
def test_prefill_in_16_bits(poison, dtype):
    case = PagedCase([150, 140], 4, 2, 64, 256, [22, 140], dtype=dtype)
    close(case.prefill(paged_prefill), case.dense(), dtype)


@pytest.mark.parametrize(("dim", "itemsize"), [(128, 2), (256, 2), (128, 4)])
def test_lengths_of_tilings_meet_every_tiling(dim, itemsize):
    lengths = paged_prefill.lengths_of_tilings(dim, itemsize)
    met = [paged_prefill._tiling(dim, itemsize, length) for length in lengths]
    assert len(set(met)) == len(met)
    assert set(met) == {paged_prefill._tiling(dim, itemsize, length) for length in range(1, 300)}


def test_causal_attention(poison):
    case = PagedCase([1, 70, 16], 6, 2, 32, 16, [1, 70, 16])
    k, v = torch.cat(case.keys), torch.cat(case.values)
    out = paged_prefill.causal_attention(case.q, k, v, case.cu_seqlens, case.scale)
    close(out, case.dense())


# ------------------------------------------------------------------ sampling

SAMPLERS = pytest.mark.parametrize("sample", [reference.sample, sampling.sample])


def sampling_case(rows, vocab, dtype=torch.float32):
    temperatures = torch.rand(rows, device=DEVICE) + 0.2
    temperatures[::3] = 0
    seeds = torch.randint(-(2**62), 2**62, (rows,), device=DEVICE)
    steps = torch.randint(0, 5000, (rows,), device=DEVICE)
    return randn(rows, vocab, dtype=dtype) * 3, temperatures, seeds, steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [5, 4096, 10000])
def test_sample_agrees_with_its_reference(poison, vocab, dtype):
    case = sampling_case(9, vocab, dtype)
    assert torch.equal(sampling.sample(*case), reference.sample(*case))


@SAMPLERS
def test_greedy_takes_the_lowest_of_equals(poison, sample):
    logits, temperatures, seeds, steps = sampling_case(4, 9000)
    for row, first in enumerate((17, 4095, 4097, 8999)):
        logits[row, first:] = 50.0
    tokens = sample(logits, torch.zeros_like(temperatures), seeds, steps)
    assert tokens.tolist() == [17, 4095, 4097, 8999]


@SAMPLERS
def test_excluded_tokens_are_never_drawn(poison, sample):
    logits, temperatures, seeds, steps = sampling_case(6, 5000)
    allowed = torch.zeros(5000, dtype=torch.bool, device=DEVICE)
    allowed[[3, 4100]] = True
    tokens = sample(logits.masked_fill(~allowed, float("-inf")), temperatures, seeds, steps)
    assert set(tokens.tolist()) <= {3, 4100}


@SAMPLERS
@pytest.mark.parametrize("vocab", [1, 5, 9000])
def test_a_draw_is_a_token_whatever_the_logits(poison, sample, vocab):
    """No row may leave the vocabulary: the next step looks its token up in the embedding."""
    logits, temperatures, seeds, steps = sampling_case(12, vocab)
    nan, inf = float("nan"), float("inf")
    for row, value in enumerate((nan, nan, -inf, -inf, inf, inf)):
        logits[row] = value
    for row in range(6, 12):
        logits[row, torch.rand(vocab, device=DEVICE) < 0.5] = nan if row < 9 else inf
    temperatures[1], temperatures[3], temperatures[7] = 0.7, 1e-30, 1e30
    tokens = sample(logits, temperatures, seeds, steps)
    assert ((tokens >= 0) & (tokens < vocab)).all()
    assert tokens[:4].tolist() == [0, 0, 0, 0]
    for row in range(6, 9):
        assert vocab < 9000 or not logits[row, tokens[row]].isnan()


@SAMPLERS
def test_a_draw_depends_on_its_own_row_only(poison, sample):
    logits, temperatures, seeds, steps = sampling_case(6, 3000)
    together = sample(logits, temperatures, seeds, steps)
    for n in range(6):
        row = slice(n, n + 1)
        assert sample(logits[row], temperatures[row], seeds[row], steps[row]) == together[row]


@SAMPLERS
def test_rows_may_be_strided(poison, sample):
    logits, *rest = sampling_case(5, 4200)
    wide = torch.cat([logits, logits + 100], dim=1)
    assert torch.equal(sample(wide[:, :4200], *rest), sample(logits, *rest))


# ------------------------------------------------------------------ top-k and top-p

# Sums in float32, in another order: a token whose cumulative probability is this close to top_p
# may stay or go.
BORDER = 1e-6
CUTS = pytest.mark.parametrize("find_cut", [reference.find_cut, likely.find_cut])
LIMITS = pytest.mark.parametrize("limits", ["k", "p", "kp"])


def cut_case(rows, vocab, dtype, limits, spread=3.0):
    """Arguments of ``find_cut``; all rows but the last are filtered."""
    logits = (randn(rows, vocab) * spread).to(dtype)
    temperatures = torch.rand(rows, device=DEVICE) * 1.5 + 0.1
    top_k = torch.randint(1, vocab + 3, (rows - 1,), device=DEVICE)
    few = torch.tensor([1, 20, vocab], device=DEVICE)
    top_k[:3] = few
    top_p = torch.rand(rows - 1, device=DEVICE)
    top_p[1:5] = torch.tensor([0.9, 1e-6, 1.0, 0.999], device=DEVICE)
    ids = torch.arange(rows - 1, device=DEVICE)
    return (
        logits,
        temperatures,
        ids,
        top_k if "k" in limits else None,
        top_p if "p" in limits else None,
    )


def within(logits, cut):
    """Which tokens of each row stay, by a cut."""
    least, last = (x[:, None] for x in cut)
    among = torch.arange(logits.shape[1], device=logits.device) <= last
    return ((logits > least) | ((logits == least) & among)) & (logits > float("-inf"))


def check_cut(cut, logits, temperatures, rows, top_k, top_p, border=BORDER):
    """That what stays is right by sorting, but for what lies at the border of top_p."""
    stay = within(logits, cut)
    for item, row in enumerate(rows.tolist()):
        values = torch.where(logits[row].isnan(), float("-inf"), logits[row].double())
        ordered, order = values.sort(descending=True, stable=True)
        limit = len(values) if top_k is None else int(top_k[item])
        limit = min(limit, int((ordered > float("-inf")).sum()))
        count = int(stay[row].sum())
        assert count <= limit
        assert stay[row][order[:count]].all(), "what stays is not the likeliest, or not the lowest"
        p = 1.0 if top_p is None else float(top_p[item])
        if p >= 1:
            assert count == limit
        elif limit > 0:
            mass = (ordered[:limit] / temperatures[row].double()).softmax(0)
            before = mass.cumsum(0) - mass
            assert count >= 1
            assert count == 1 or before[count - 1] < p + border
            assert count == limit or before[count] >= p - border
    unfiltered = torch.ones(len(logits), dtype=torch.bool, device=DEVICE)
    unfiltered[rows] = False
    assert torch.equal(stay[unfiltered], logits[unfiltered] > float("-inf"))


@CUTS
@LIMITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "spread"), [(50, 3.0), (9000, 3.0), (17000, 0.3)])
def test_cut(poison, find_cut, vocab, spread, dtype, limits):
    """In 16 bits many of the logits are equal."""
    case = cut_case(8, vocab, dtype, limits, spread)
    check_cut(find_cut(*case), *case)


@CUTS
@LIMITS
def test_cut_of_odd_rows(poison, find_cut, limits):
    logits, *rest = cut_case(12, 9000, torch.float32, limits)
    logits[0], logits[1], logits[2, 5:] = 1.5, float("-inf"), float("-inf")
    logits[3, ::2], logits[4, ::3] = float("nan"), -3.4e38
    logits[5] = logits[5].round()
    logits[6, torch.randperm(9000)[:5000]] = float("-inf")
    logits[7], logits[7, 8000:] = 0.0, -0.0
    logits[8] *= 1e6
    check_cut(find_cut(logits, *rest), logits, *rest)


@LIMITS
def test_cuts_agree_with_sorting(poison, limits):
    """Probabilities so far apart that no rounding decides."""
    logits, temperatures, rows, top_k, top_p = cut_case(6, 5000, torch.float32, limits)
    logits = torch.argsort(logits, dim=-1).argsort(-1).float() * 0.7
    if top_p is not None:
        top_p[:] = torch.tensor([0.3, 0.62, 0.97, 1.0, 1e-9], device=DEVICE)
    temperatures[:] = 1.0
    everything, certain = torch.full_like(rows, 5000), temperatures.new_ones(len(rows))
    kept = reference.keep_likely(
        logits[rows],
        temperatures[rows],
        everything if top_k is None else top_k,
        certain if top_p is None else top_p,
    )
    cut = likely.find_cut(logits, temperatures, rows, top_k, top_p)
    assert torch.equal(within(logits, cut)[rows], kept > float("-inf"))


@LIMITS
def test_a_cut_depends_on_its_own_row_only(poison, limits):
    logits, temperatures, rows, top_k, top_p = cut_case(7, 9000, torch.bfloat16, limits)
    together = likely.find_cut(logits, temperatures, rows, top_k, top_p)
    for n in range(6):
        one = [None if x is None else x[n : n + 1] for x in (top_k, top_p)]
        alone = likely.find_cut(logits, temperatures, rows[n : n + 1], *one)
        assert [x[n] for x in alone] == [x[n] for x in together]


@SAMPLERS
def test_a_draw_stays_within_the_cut(poison, sample):
    logits, temperatures, seeds, steps = sampling_case(6, 5000)
    logits = logits.round()
    cut = (logits.amax(-1) - 1, torch.full((6,), 3000, dtype=torch.int32, device=DEVICE))
    kept = logits.masked_fill(~within(logits, cut), float("-inf"))
    expected = sample(kept, temperatures, seeds, steps)
    assert torch.equal(sample(logits, temperatures, seeds, steps, cut), expected)


def test_as_many_passes_as_any_row_may_need():
    """Seven pivots leave an eighth of the keys, so 3 bits a pass: 16, 19 and 32 bits."""
    assert [likely.num_passes(shift) for shift in (16, 13, 0)] == [6, 7, 11]


# ------------------------------------------------------------------ draws by chance


def chi_square(counts, probs):
    """How far chi-square lies above what is expected, in its standard deviations."""
    expected = probs * counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(probs) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("vary", ["seed", "step"])
def test_draws_follow_the_softmax(vary):
    """Tokens of three tiles of the vocabulary; the second tile has none that may be drawn."""
    draws, live = 2000, torch.tensor([*range(12), 4095, *range(8192, 8200), 8999], device=DEVICE)
    logits = torch.full((9000,), float("-inf"), device=DEVICE)
    logits[live] = randn(len(live)) * 1.5
    counter = torch.arange(draws, device=DEVICE)
    fixed = torch.full_like(counter, random.randrange(2**60))
    seeds, steps = (counter + fixed, fixed) if vary == "seed" else (fixed, counter)
    temperatures = torch.full((draws,), 1.3, device=DEVICE)
    tokens = torch.cat(
        [
            reference.sample(logits.expand(len(t), -1), t, s, n)
            for t, s, n in zip(*(x.split(500) for x in (temperatures, seeds, steps)), strict=True)
        ]
    )
    counts = torch.bincount(tokens, minlength=9000).double()
    assert counts[live].sum() == draws
    assert chi_square(counts[live], (logits[live] / 1.3).softmax(0).double()) < 7


def test_random_bits_are_uniform_and_uncorrelated():
    seeds = torch.arange(40, device=DEVICE)[:, None] + random.randrange(2**40)
    bits = reference.random_bits(seeds, torch.zeros_like(seeds), torch.arange(5000, device=DEVICE))
    for byte in range(4):
        counts = torch.bincount(((bits >> (8 * byte)) & 255).flatten(), minlength=256).double()
        assert chi_square(counts, torch.full((256,), 1 / 256, device=DEVICE)) < 7
    uniform = bits.double() / 2**32 - 0.5
    limit = 6 / 12 / math.sqrt(bits.numel())  # 6 sigma of a mean of products of variance 1/144
    assert abs(uniform.mean()) < 6 * math.sqrt(1 / 12 / bits.numel())
    assert abs((uniform[:, 1:] * uniform[:, :-1]).mean()) < limit  # neighbouring tokens
    assert abs((uniform[1:] * uniform[:-1]).mean()) < limit  # neighbouring seeds


def test_exponential_has_fine_tails():
    bits = torch.tensor([0, 1, 2**20, 2**26 - 1, 2**26, 2**31, 2**32 - 1], device=DEVICE)
    exact = -torch.log1p(-(bits.double() + 0.5) / 2**32)
    actual = reference.exponential(bits)
    assert (actual > 0).all()
    assert actual.isfinite().all()
    torch.testing.assert_close(actual[:-1].double(), exact[:-1], rtol=5e-6, atol=0)
    assert actual[-1] > 16


# ------------------------------------------------------------------ dispatch


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
        silu = kernels.linear_silu_mul(x, x[:2])
        assert torch.equal(silu, kernels.silu_mul(F.linear(x, x[:2])))
        kernels.qk_norm_rope(**without_cache(case))
        kernels.qk_norm_rope_store(**case)
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
    assert small_gemm.linear(randn(rows, 256), randn(8, 256)).shape == (0, 8)


def test_resolve_tokens_replaces_what_only_the_device_knows():
    last_tokens = torch.randint(0, 1000, (300,), device=DEVICE)
    for count in (1, 7, 300):
        input_ids = torch.randint(-300, 300, (count,), dtype=torch.int32, device=DEVICE)
        expected = [int(last_tokens[-1 - i]) if i < 0 else i for i in input_ids.tolist()]
        assert reference.resolve_tokens(input_ids, last_tokens).tolist() == expected
        assert tokens.resolve_tokens(input_ids, last_tokens).tolist() == expected
