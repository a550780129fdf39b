"""The decode kernel compiles for a GPU, in each of its tunings: the interpreter checks no types.

Compiling needs no GPU, but a process in which Triton is not set to interpret.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import scripts

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nanovllm.kernels import paged_decode

TYPES = dict(
    q="*bf16", out="*bf16", partial_out="*fp32", partial_lse="*fp32", arrivals="*i32",
    block_tables="*i32", context_lens="*i32", tile_offsets="*i32", scale_log2="fp32",
    num_seqs="i32", table_stride="i32",
)
tuning, group = getattr(paged_decode, sys.argv[1]), int(sys.argv[2])
options = paged_decode.kernel_options(tuning, 8, group, 128, 256, 2)
constants = {name: value for name, value in options.items() if name.isupper()}
compiler = {name: value for name, value in options.items() if not name.isupper()}
cache = f"tensordesc<bf16[{paged_decode.TILE}, 128]>" if tuning.tma else "*bf16"
signature = {**TYPES, "k_cache": cache, "v_cache": cache, **dict.fromkeys(constants, "constexpr")}
kernel = paged_decode._decode_kernel
source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compiler)
print(compiled.asm["ptx"])
"""


@pytest.mark.parametrize(("tuning", "group"), [("PLAIN", 2), ("TMA", 4), ("KEYS_FIRST", 5)])
def test_decode_compiles_for_hopper(
    tuning: str, group: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    result = scripts.run(script, tuning, group, timeout=120)
    assert result.returncode == 0, result.stderr
    assert ".entry _decode_kernel" in result.stdout
    uses_bulk_copies = "cp.async.bulk.tensor" in result.stdout
    assert uses_bulk_copies == (tuning != "PLAIN")
