"""Attention back ends: torch against dense attention, flash_attn's calls against torch.

The flash-attn package needs a GPU, so a stand-in takes its place: the two functions that we call,
with the arguments that we pass and their meaning in flash-attn 2.8.
"""

import os
import sys
from types import ModuleType

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine import model_runner
from nanovllm.layers.attention import (
    AttentionMetadata,
    DecodeMetadata,
    HeadShape,
    PrefillMetadata,
    TorchBackend,
    make_backend,
)
from nanovllm.layers.attention_flash import FlashAttnBackend
from tests.checkpoints import Shape, prompts
from tests.engine.cases import tokens
from tests.kernels.cases import new_seed
from tests.paged_sequences import PagedSequences, dense_attention

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> int:
    return new_seed()


class Case(PagedSequences):
    """Sequences for the back ends, of which flash-attn's stand-in reads whole block tables."""

    def __init__(self, context, rows, *sizes):
        super().__init__(context, *sizes, rows, device=CPU, stale=1e4, unused=0)
        self.heads = HeadShape(*sizes[:3])

    def attend(self, backend, num_decode):
        """The first `num_decode` sequences, of one row each, decode; the others are prompts."""
        decode = prefill = None
        if num_decode:
            lengths = self.lens[:num_decode]
            plan = torch.from_numpy(backend.plan(lengths.numpy()))
            workspace = backend.make_workspace(CPU, 2)
            decode = DecodeMetadata(self.tables[:num_decode], lengths, plan, workspace)
        if rows := self.query_lens[num_decode:]:
            cu = torch.tensor([0, *rows]).cumsum(0).to(torch.int32)
            lengths = self.lens[num_decode:]
            prefill = PrefillMetadata(self.tables[num_decode:], lengths, cu, max(rows))
        metadata = AttentionMetadata(self.slots, decode, prefill)
        return backend.attend(self.q, (self.k_cache, self.v_cache), metadata)


HEADS = [(2, 2, 32), (4, 2, 64), (4, 1, 128), (5, 1, 64), (8, 1, 32)]


@pytest.fixture
def mixed() -> Case:
    """Sequences that decode, a prompt's chunk behind cached tokens, prompts; a chunk of one row."""
    return Case([300, 1, 256, 40, 17, 1], [1, 1, 1, 3, 17, 1], 4, 2, 64, 256)


def triton_backend(heads: HeadShape):
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton does not interpret here")
    from nanovllm.layers.attention_triton import TritonBackend

    return TritonBackend(heads)


BACKENDS = {
    "torch": TorchBackend,
    "flash_attn": lambda heads: FlashAttnBackend(heads, 256),
    "triton": triton_backend,
}


@pytest.mark.parametrize(
    ("name", "block_size"),
    [("torch", 16), ("torch", 48), ("torch", 256), ("flash_attn", 256), ("flash_attn", 512)],
)
@pytest.mark.parametrize("heads", HEADS)
def test_a_backend_equals_dense_attention(flash_attn, name, heads, block_size):
    case = Case([5, 300, 257, 1], [5, 3, 257, 1], *heads, block_size)
    backend = BACKENDS[name](case.heads)
    torch.testing.assert_close(case.attend(backend, 0), case.dense())
    case = Case([1, 40, 16, 300], [1] * 4, *heads, block_size)
    torch.testing.assert_close(case.attend(backend, 4), case.dense())


@pytest.mark.parametrize("num_decode", range(4))
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_both_kinds_attend_in_one_call(mixed, flash_attn, name, num_decode):
    found = mixed.attend(BACKENDS[name](mixed.heads), num_decode)
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if name == "triton" else {}
    torch.testing.assert_close(found, mixed.dense(), **tolerance)


def test_torch_gives_a_sequence_the_same_bits_alone_and_in_a_batch():
    case = Case([20, 33, 7], [1] * 3, 4, 2, 64, 16)
    together = case.attend(TorchBackend(case.heads), 3)
    for n in range(3):
        lengths, plan = case.lens[n : n + 1], torch.empty(0, dtype=torch.int32)
        metadata = AttentionMetadata(
            case.slots[n : n + 1], DecodeMetadata(case.tables[n : n + 1], lengths, plan, None)
        )
        cache = case.k_cache, case.v_cache
        alone = TorchBackend(case.heads).attend(case.q[n : n + 1], cache, metadata)
        assert torch.equal(alone[0], together[n])


# ------------------------------------------------------------------ a stand-in for flash-attn


def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, **options):
    """q [batch, rows, heads, D]: the last rows of each sequence."""
    assert cache_seqlens.shape == (len(q),)
    cu_seqlens_q = torch.arange(len(q) + 1, dtype=torch.int32) * q.shape[1]
    cu_seqlens_k = torch.tensor([0, *cache_seqlens]).cumsum(0, dtype=cache_seqlens.dtype)
    options |= {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    options |= {"max_seqlen_q": q.shape[1], "max_seqlen_k": int(cache_seqlens.max())}
    return flash_attn_varlen_func(q.flatten(0, 1), k_cache, v_cache, **options).view(q.shape)


def flash_attn_varlen_func(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    block_table, softmax_scale, causal,
):  # fmt: skip
    """q [total, heads, D]; k and v are paged caches [blocks, page, kv heads, D]."""
    assert causal
    assert k.shape == v.shape
    assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
    for x in (k, v, block_table):
        assert x.stride(-1) == 1, "last dimension must be contiguous"
    for x in (cu_seqlens_q, cu_seqlens_k, block_table):
        assert x.dtype == torch.int32
    counts, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert max(counts) <= max_seqlen_q
    assert max(lengths) <= max_seqlen_k
    out = []
    for rows, table, length in zip(q.split(counts), block_table.tolist(), lengths, strict=True):
        keys, values = (torch.cat([x[block] for block in table])[:length] for x in (k, v))
        out.append(dense_attention(rows, keys, values, softmax_scale))
    return torch.cat(out)


@pytest.fixture
def flash_attn(monkeypatch) -> ModuleType:
    module = ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


def test_an_engine_on_flash_attn_says_what_one_on_torch_says(flash_attn, monkeypatch, tmp_path):
    Shape().write(tmp_path)
    options = {"device": "cpu", "max_num_batched_tokens": 100}
    given = prompts(1, count=3, longest=200)

    def run() -> list:
        with LLM(str(tmp_path), **options) as llm:
            return tokens(llm.generate(given, temperature=0, max_tokens=9, use_tqdm=False))

    expected = run()
    made = []

    def make_flash(name, heads, device, block_size, eager):
        made.append(FlashAttnBackend(heads, block_size))
        return made[-1]

    monkeypatch.setattr(model_runner, "make_backend", make_flash)
    assert run() == expected
    assert made


# ------------------------------------------------------------------ choosing one


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_the_cpu_has_torch(name):
    assert isinstance(make_backend(name, HeadShape(2, 1, 64), CPU, 16), TorchBackend)


@pytest.mark.parametrize(
    ("name", "head_dim", "words"),
    [("torch", 64, "attention_backend='torch'.*enforce_eager=True"), ("auto", 80, "head_dim=80"),
     ("torch", 96, "head_dim=96 is not allowed.*128")],
)  # fmt: skip
def test_what_cuda_cannot_run_is_refused_before_anything_is_loaded(name, head_dim, words):
    with pytest.raises(ValueError, match=words):
        make_backend(name, HeadShape(2, 1, head_dim), torch.device("cuda"), 16)


@pytest.mark.parametrize("name", ["triton", "flash_attn"])
def test_the_cpu_has_no_other(name, tmp_path):
    Shape(layers=1).write(tmp_path)
    with pytest.raises(ValueError, match="not allowed on device cpu") as caught:
        LLM(str(tmp_path), device="cpu", attention_backend=name)
    for part in (f"attention_backend='{name}'", "cpu", "'auto' or 'torch'"):
        assert part in str(caught.value)


def test_flash_attn_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(
        ImportError, match=r"attention_backend='flash_attn' .* pip install flash-attn"
    ):
        FlashAttnBackend(HeadShape(2, 1, 64), 256)


@pytest.mark.parametrize("block_size", [16, 128, 384])
def test_flash_attn_needs_blocks_of_multiples_of_256(flash_attn, block_size):
    with pytest.raises(ValueError, match=f"kvcache_block_size={block_size} .* multiple of 256"):
        FlashAttnBackend(HeadShape(2, 1, 64), block_size)
