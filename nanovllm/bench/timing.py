"""How long a piece of work takes in steady state: called again and again, and the median.

On a GPU the calls are issued without waiting and timed by events, so that the device never runs
dry between two of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median

import torch

# The first calls of all may compile kernels.
FIRST_CALLS = 3
FEWEST_CALLS = 6
MOST_CALLS = 5000


def steady_seconds(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call in seconds.

    Args:
        call: issues the work on the current stream.
        device: where the work runs, and the current one if it is a CUDA device.
        seconds: of calls in a row. The first third of them does not count: clocks and power
            settle meanwhile.
    """
    once = median(time_calls(call, device, FIRST_CALLS))
    count = min(max(math.ceil(seconds / max(once, 1e-9)), FEWEST_CALLS), MOST_CALLS)
    return median(time_calls(call, device, count)[count // 3 :])


def time_calls(call: Callable[[], object], device: torch.device, count: int) -> list[float]:
    """Seconds from the end of each call's work to the end of the next one's, `count` of them."""
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(count):
            call()
            moments.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(moments)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    marks[-1].synchronize()
    return [begin.elapsed_time(end) * 1e-3 for begin, end in pairwise(marks)]
