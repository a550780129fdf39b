"""Random calls for minutes, while memory, descriptors, threads and KV blocks may not grow.

    python tests/soak.py --minutes 30 --seed 1 [--device cuda] [--parts calls faults engines]

What is called is in soak_calls.py. Between two calls the engines are idle, and every few seconds
what is in use is printed. Exits with status 1 if the last two minutes saw 1% more memory than the
first two, if they saw more file descriptors, threads, KV blocks or device memory at all, or if a
token was wrong or a request lost.
"""

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


def highest(samples: Sequence[dict[str, int]]) -> dict[str, int]:
    """The highest value of each: what is in use depends on the last call."""
    return {name: max(sample[name] for sample in samples) for name in samples[0]}


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
    """Soaks for that time; what was in use at most in its first part and in its last.

    They are as long as the warm-up, or half of the time if that is shorter.
    """
    calls = RandomCalls(seed, device, parts)
    part, start = min(WARM_UP_SECONDS, seconds / 2), time.monotonic()
    samples: list[tuple[float, dict[str, int]]] = []
    seen = 0
    while (now := time.monotonic() - start) < seconds or calls.count < 2:
        if len(calls.problems) >= 20:
            break
        calls.one()
        if not samples or now - samples[-1][0] >= min(5, part / 4):
            samples.append((now, measure(calls, device)))
            sample = ", ".join(f"{name} {value}" for name, value in samples[-1][1].items())
            print(f"{now:6.0f} s, {calls.count} calls: {sample}", flush=True)
        for problem in calls.problems[seen:]:
            print(f"{now:6.0f} s, PROBLEM: {problem}", flush=True)
        seen = len(calls.problems)
    calls.exit()
    first = [sample for moment, sample in samples if moment <= part]
    last = [sample for moment, sample in samples if moment >= samples[-1][0] - part]
    return calls, highest(first), highest(last)


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
    print(f"\n{'highest in the':20}{'first part':>16}{'last part':>16}")
    for name, value in first.items():
        print(f"{name:20}{value:16}{last[name]:16}{'  GREW' if name in grown else ''}")
    print("\n".join(calls.problems) or f"{calls.count} calls: no wrong token, no request lost")
    return 1 if grown or calls.problems else 0


if __name__ == "__main__":
    sys.exit(main())
