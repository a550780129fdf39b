"""Kernels of a decode step compile for Hopper, and wait: the interpreter checks neither.

Compiling needs no GPU, but a process in which Triton is not set to interpret.
"""

import json

import pytest

from tests import scripts

COMPILE = """
import json
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanovllm.kernels import activation, all_reduce, fused_gemm, norm, paged_decode, rope
from nanovllm.kernels import small_gemm

TYPES = dict(
    eps="fp32", scale_log2="fp32", cos_sin="*fp32", partial_out="*fp32", partial_lse="*fp32",
    parts="*fp32", sum_sq="*fp32", x_sum_sq="*fp32", arrivals="*i32", block_tables="*i32",
    context_lens="*i32", tile_offsets="*i32", positions="*i32", slot_mapping="*i32",
    num_seqs="i32", table_stride="i32", tokens="i32",
)


def tiles(*shape):
    return f"tensordesc<bf16[{', '.join(map(str, shape))}]>"


def compile(kernel, constants, options, without=(), **types):
    constants = {"PDL": True, **dict.fromkeys(without), **constants}
    types = {name: TYPES.get(name, "*bf16") for name in kernel.arg_names} | types
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if str(types[name]).startswith("*")
    }
    source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants, aligned)
    options = {"launch_pdl": True, **options}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def decode(tuning, group):
    tuning = getattr(paged_decode, tuning)
    options = paged_decode.kernel_options(tuning, 8, int(group), 128, 256, 2)
    constants = {name: value for name, value in options.items() if name.isupper()}
    compiler = {name: value for name, value in options.items() if not name.isupper()}
    cache = tiles(1, paged_decode.TILE, 128) if tuning.tma else "*bf16"
    return compile(paged_decode._decode_kernel, constants, compiler, k_cache=cache, v_cache=cache)


def silu_pairs(tokens, block):
    return tiled(fused_gemm._linear_silu_mul_kernel, dict(INTER=3072, INNER=1024), tokens, block)


def head_pairs(tokens, block, *without):
    constants = dict(Q_HEADS=16, KV_HEADS=8, BLOCK_SIZE=256, INNER=1024)
    return tiled(fused_gemm._linear_norm_rope_store_kernel, constants, tokens, block, without)


def tiled(kernel, constants, tokens, block, without=()):
    tile = fused_gemm.Tiles(int(tokens), int(block))
    options = fused_gemm.kernel_options(tile) | constants
    constants = {name: value for name, value in options.items() if name.isupper()}
    compiler = {name: value for name, value in options.items() if not name.isupper()}
    del constants["PDL"]  # of this machine
    x, weight = tiles(*tile), tiles(fused_gemm._FEATURES, tile.block)
    return compile(kernel, constants, compiler, without, x=x, weight=weight)


def split(tokens, block):
    return tiled(fused_gemm._parts_kernel, dict(OUT=1024, PART=512), tokens, block)


def norms(parts):
    constants = dict(HIDDEN=1024, BLOCK=1024, PARTS=int(parts))
    without = [] if int(parts) > 1 else ["residual", "total"]
    x = "*fp32" if int(parts) > 1 else "*bf16"
    return compile(norm._rms_norm_kernel, constants, dict(num_warps=4), without, x=x)


def silu():
    return compile(activation._silu_mul_kernel, dict(INTER=3072, BLOCK=1024), dict(num_warps=4))


def heads(*without):
    constants = dict(Q_HEADS=16, KV_HEADS=8, BLOCK_SIZE=256, HALF=64, HEADS=8)
    options = dict(num_warps=2)
    return compile(rope._norm_rope_store_kernel, constants, options, without, qkv_stride="i32")


def small(side, tokens, rows="8"):
    constants = dict(
        INNER=1024, TOKENS=int(tokens), ROWS=int(rows), SPLIT=4, BLOCK=64, GATED=side != "before",
        FEATURES=3072, NUM_SUM_SQ=128, SUM_SQ_BLOCK=128,
        PREFETCH=512 if side == "after all-reduce" else 0,
    )
    without = ["bias", "x_sum_sq"]
    if side != "before":
        without = ["residual", "norm_weight", "scaled", "sum_sq"]
    options = dict(num_warps=4, num_stages=5)
    return compile(small_gemm._linear_kernel, constants, options, without)


def reduce(ranks, two_shot):
    constants = dict(
        HIDDEN=4096, BLOCK=4096, RANK=1, SIZE=int(ranks), MAX_PROGRAMS=264,
        TWO_SHOT=two_shot == "two-shot",
    )
    tables = dict.fromkeys(["parts", "inboxes", "outputs", "counters"], ("i64",) * int(ranks))
    numbers = dict.fromkeys(["first_row", "rows", "polls"], "i32")
    state = dict.fromkeys(["launches", "expired"], "*i32")
    return compile(
        all_reduce._all_reduce_kernel, constants, dict(num_warps=16, maxnreg=64),
        **tables, **numbers, **state,
    )


def push(ranks, dtype):
    words = 2048 if dtype == "bf16" else 4096
    constants = dict(
        HIDDEN=4096, WORDS=words, BLOCK=words, RANK=1, SIZE=int(ranks), CAPACITY=16, THREADS=256,
    )
    given = dict.fromkeys(["first_row", "polls"], "i32")
    given |= dict.fromkeys(["part", "output", "residual", "weight"], "*" + dtype)
    state = dict.fromkeys(["launches", "expired"], "*i32")
    return compile(
        all_reduce._push_kernel, constants, dict(num_warps=8), inboxes=("i64",) * int(ranks),
        **given, **state,
    )


cases = json.loads(sys.argv[1])
print(json.dumps([globals()[kernel](*arguments) for kernel, arguments in cases]))
"""

CASES = [
    ("decode", ["PLAIN", "2"], "cp.async.cg"),
    ("decode", ["TMA", "4"], "cp.async.bulk.tensor"),
    ("decode", ["KEYS_FIRST", "5"], "cp.async.bulk.tensor"),
    ("silu_pairs", ["16", "128"], "wgmma"),
    ("head_pairs", ["64", "64", "bias"], "wgmma"),
    ("head_pairs", ["64", "64", "q_weight", "k_weight"], "wgmma"),
    ("split", ["32", "128"], "wgmma"),
    ("norms", ["4"], "rsqrt"),
    ("norms", ["1"], "rsqrt"),
    ("silu", [], "ex2"),
    ("heads", [], "rsqrt"),
    ("heads", ["q_weight", "k_weight"], "st.global"),
    ("small", ["before", "1"], "mma.sync"),
    ("small", ["after", "8"], "mma.sync"),
    ("small", ["after", "8", "16"], "mma.sync"),
    ("small", ["after all-reduce", "8"], "cp.async.bulk.prefetch.L2.global"),
    ("reduce", ["2", "one-shot"], "ld.global.cg.v4"),
    ("reduce", ["4", "two-shot"], "st.global.v4"),
    ("push", ["2", "fp32"], "ld.volatile.global"),
    ("push", ["4", "bf16"], "ld.volatile.global"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """PTX of all cases, by one process."""
    cases = json.dumps([case[:2] for case in CASES])
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("TRITON_INTERPRET", raising=False)
        environment.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        (said,) = scripts.output_of("-c", COMPILE, cases, timeout=600)
    return json.loads(said)


@pytest.mark.parametrize("place", range(len(CASES)), ids=[" ".join([k, *a]) for k, a, _ in CASES])
def test_a_kernel_compiles_for_hopper(compiled, place):
    (kernel, _, contains), ptx = CASES[place], compiled[place]
    assert contains in ptx
    assert ptx.count("griddepcontrol.launch_dependents") == 1
    *before, _ = ptx.partition(".entry")[2].split("griddepcontrol.wait")
    # Decode also waits where its range is empty.
    assert len(before) == (2 if kernel == "decode" else 1), "a way through the kernel does not wait"
    # Until then nothing is written, nor read that the kernel before may have made. Decode reads
    # lengths and tables, and the all-reduce its norm's weights, which are older.
    accesses = ["st.global", "cp.async.cg", "cp.async.bulk.tensor", "atom.global"]
    if kernel not in ("decode", "reduce", "push"):
        accesses.append("ld.global")
    assert not [access for access in accesses for part in before if access in part]
