"""A kernel that does nothing but read: the bandwidth that so many SMs can reach.

torch has none: its reductions have too few bytes under way per SM for a small partition.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Per SM, 8 programs that each have 16 KiB under way.
PROGRAMS_PER_SM = 8
TILE = 4096


def read_all(source: torch.Tensor, sums: torch.Tensor, num_sms: int) -> torch.Tensor:
    """Reads `source` once, by programs that fill `num_sms` SMs.

    Args:
        source: float32 [M], M a multiple of `TILE` below 2**31.
        sums: float32 [num_sms * PROGRAMS_PER_SM], written.
        num_sms: SMs that the kernel may use, the partition's or the whole device's.

    Returns:
        `sums`: what each program has read, added up.
    """
    _read_kernel[(num_sms * PROGRAMS_PER_SM,)](
        source, sums, source.numel() // TILE, TILE=TILE, num_warps=4
    )
    return sums


@triton.jit
def _read_kernel(source, sums, num_tiles, TILE: tl.constexpr):
    column = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for tile in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        total += tl.load(source + tile * TILE + column)
    tl.store(sums + tl.program_id(0), tl.sum(total))
