"""Random calls for minutes, while memory, descriptors, threads and KV blocks may not grow.

    python tests/soak.py --minutes 30 --seed 1 [--device cuda] [--parts calls faults engines]

What is called is in soak_calls.py. Between two calls the engines are idle, and every few seconds
what is in use is printed. Exits with status 1 if memory grew by 1% or more after the first two
minutes, if file descriptors, threads, KV blocks or device memory grew at all, or if a token was
wrong or a request lost.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

if __name__ == "__main__":  # the repository's packages, wherever the script is started
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.soak_calls import PARTS, RandomCalls

WARM_UP_SECONDS = 120


def measure(calls: RandomCalls, device: str) -> dict[str, int]:
    """What may not grow, between two calls."""
    gc.collect()
    # Or else free memory that the allocator keeps in pieces would look like a leak.
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    sample = {
        "RSS [KiB]": pages * os.sysconf("SC_PAGE_SIZE") >> 10,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "KV blocks in use": sum(driven.blocks_in_use() for driven in calls.living),
    }
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        sample |= {
            "device memory [B]": total - free,
            "allocated [B]": torch.cuda.memory_allocated(),
        }
    return sample


def growth(first: dict[str, int], last: dict[str, int]) -> list[str]:
    """The names of what grew: RSS by 1% or more, anything else at all."""
    return [
        name
        for name in first
        if last[name] > first[name] and (name != "RSS [KiB]" or last[name] >= 1.01 * first[name])
    ]


def run(
    seconds: float, seed: int = 0, device: str = "cpu", parts: Sequence[str] = PARTS
) -> tuple[RandomCalls, dict[str, int], dict[str, int]]:
    """Soaks for that time; the first sample is of after the warm-up, a half of it at the most."""
    calls = RandomCalls(seed, device, parts)
    start, reported = time.monotonic(), 0.0
    first: dict[str, int] | None = None
    while (now := time.monotonic() - start) < seconds and len(calls.problems) < 20:
        calls.one()
        if first is None and now >= min(WARM_UP_SECONDS, seconds / 2):
            first = measure(calls, device)
        if now - reported >= 5:
            reported = now
            sample = ", ".join(f"{name} {value}" for name, value in measure(calls, device).items())
            print(f"{now:6.0f} s, {calls.count} calls: {sample}; {len(calls.problems)} problems")
    last = measure(calls, device)
    calls.exit()
    return calls, first or last, last


def main() -> int:
    parser = argparse.ArgumentParser(description="Random calls for minutes; see the docstring.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # small models only wait for their threads
    calls, first, last = run(args.minutes * 60, args.seed, args.device, args.parts)
    grown = growth(first, last)
    print(f"\n{'':20}{'warmed up':>16}{'end':>16}")
    for name, value in first.items():
        print(f"{name:20}{value:16}{last[name]:16}{'  GREW' if name in grown else ''}")
    print("\n".join(calls.problems) or f"{calls.count} calls: no wrong token, no request lost")
    return 1 if grown or calls.problems else 0


if __name__ == "__main__":
    sys.exit(main())
