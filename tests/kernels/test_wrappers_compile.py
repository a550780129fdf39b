"""What wrappers launch compiles for Hopper; the interpreter lets through what a compiler refuses.

The wrappers run on the CPU; a launch compiles its kernel for the arguments it got.
``test_compiles`` has the kernels of a layer, and looks into what comes out.
"""

import pytest

from tests import scripts

SCRIPT = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def type_of(argument):
    if isinstance(argument, torch.Tensor):
        return "*" + TYPES[argument.dtype]
    return "fp32" if isinstance(argument, float) else "i32"


def compile_instead(kernel, *args, grid, warmup, **options):
    given = dict(zip(kernel.arg_names, args))
    given |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    fixed = {p.name for p in kernel.params if p.is_constexpr or given[p.name] is None}
    signature = {name: "constexpr" if name in fixed else type_of(given[name]) for name in given}
    source = ASTSource(kernel, signature, {name: given[name] for name in fixed})
    compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    launched.add(kernel.__name__)


launched = set()
JITFunction.run = compile_instead
"""

DRAW = """
from nanovllm.kernels import reference_sampling, sampling, split_logits, tokens, top_k_top_p
rows, vocab = 3, 70_000
floats, ints = torch.ones(rows), torch.ones(rows, dtype=torch.int64)
for dtype in (torch.bfloat16, torch.float32):
    logits = torch.zeros(rows, vocab, dtype=dtype)
    for top_k, top_p in ((ints, None), (None, floats), (ints, floats)):
        threshold = top_k_top_p.find_threshold(logits, floats, ints, top_k, top_p)
    for limit in (None, threshold):
        for part in (None, (8192, 90_000)):
            sampling.sample(logits, floats, ints, ints, limit, part)
    split_logits.collect(logits, ints, threshold, 64)
    split_logits.tie_end(logits, ints, floats, ints)
    search = reference_sampling.Search(ints, ints, floats)
    sums = torch.zeros(2, rows, reference_sampling.PIVOTS)
    for counted in (False, True):
        for gathered in (None, sums):
            split_logits.narrow(logits, floats, ints, floats, search, gathered, floats, counted)
tokens.resolve_tokens(ints, ints)
"""

PREFILL = """
from nanovllm.kernels import paged_prefill
table, lengths = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
for dtype, head_dim, longest in (
    (torch.bfloat16, 128, 16), (torch.bfloat16, 128, 500), (torch.bfloat16, 256, 64),
    (torch.float32, 64, 40),
):
    q = torch.zeros(70, 8, head_dim, dtype=dtype)
    cache = torch.zeros(4, 2, 256, head_dim, dtype=dtype)
    starts = torch.zeros(3, dtype=torch.int32)
    paged_prefill.paged_prefill_attention(q, cache, cache, table, starts, lengths, longest, 0.1)
"""


@pytest.mark.parametrize(("calls", "kernels"), [
    (DRAW, "survey begin narrow list finish threshold weigh draw collect tie_end resolve"),
    (PREFILL, "prefill"),
], ids=["draw", "prefill"])  # fmt: skip
def test_what_is_launched_compiles_for_hopper(calls, kernels, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (launched,) = scripts.output_of("-c", SCRIPT + calls + "print(*launched)", timeout=600)
    assert set(launched.split()) == {f"_{name}_kernel" for name in kernels.split()}
