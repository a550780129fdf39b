"""A kernel whose programs record where and when they ran.

Each program stores its SM (`%smid`), its start and its end (`%globaltimer`, ns), and spins in
between so that the programs of a launch spread over all SMs they may use.
"""

import torch
import triton
import triton.language as tl

DEVICE = torch.device("cuda:0")
PROGRAMS = 4096
SPIN_NS = 20_000


@triton.jit
def record_programs(records, spin_ns):
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    start = tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )
    now = start
    while now - start < spin_ns:
        now = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    row = records + tl.program_id(0) * 3
    tl.store(row, sm.to(tl.int64))
    tl.store(row + 1, start)
    tl.store(row + 2, now)


def new_records() -> torch.Tensor:
    """Room for (SM, start, end) of every program; -1 where nothing ran."""
    records = torch.full((PROGRAMS, 3), -1, dtype=torch.int64, device=DEVICE)
    torch.cuda.synchronize()  # streams of a green context do not wait for the default stream
    return records


def launch(stream: torch.cuda.Stream, records: torch.Tensor, spin_ns: int = SPIN_NS) -> None:
    with torch.cuda.stream(stream):
        record_programs[(PROGRAMS,)](records, spin_ns, num_warps=1)


def sms_used(records: torch.Tensor) -> set[int]:
    torch.cuda.synchronize()
    sms = set(records[:, 0].tolist())
    assert -1 not in sms, "a program did not run"
    return sms
