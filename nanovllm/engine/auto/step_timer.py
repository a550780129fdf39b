"""Times single decode steps, on dummy inputs and at settled clocks.

At its power limit a GPU slows down some steps after a pause, and dips now and then. So a step is
timed until it takes the same several times in a row.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from statistics import median

import numpy as np
import torch

from nanovllm.engine.auto.calibration import StepTimer
from nanovllm.engine.plan import Choice
from nanovllm.engine.scheduler import Chunk
from nanovllm.engine.step_inputs import dummy_chunk
from nanovllm.engine.step_runner import StepRunner

# A reading is the mean of as many steps as take so long, and at least one.
READING_SECONDS = 0.02
# So many readings in a row that differ by no more than that share end the measurement.
ALIKE = 3
SPREAD = 0.02
MOST_READINGS = 24


def settled_seconds(read: Callable[[], float]) -> float:
    """The median of the first readings in a row that are alike; else of all but the first third."""
    readings: list[float] = []
    while len(readings) < MOST_READINGS:
        readings.append(read())
        last = readings[-ALIKE:]
        if len(last) == ALIKE and max(last) <= (1 + SPREAD) * min(last):
            return median(last)
    return median(readings[MOST_READINGS // 3 :])


def device_timer(
    runner: StepRunner,
    kv_cache: torch.Tensor,
    num_blocks: int,
    block_size: int,
    wait: Callable[[torch.cuda.Event], None],
) -> StepTimer:
    """Times decode steps on a CUDA device, from their inputs' copy to their logits.

    NOTE: the first call overwrites the KV cache with random numbers.
    """
    runner = weakref.proxy(runner)  # which holds this timer, by its calibration
    unfilled = list(kv_cache)

    @torch.inference_mode()
    def timer(plan: int, batch: int, tokens: int) -> float:
        while unfilled:  # zeros would take less power, hence less time
            unfilled.pop().normal_()
        context = tokens // batch
        chunks = steady_chunks(batch, context, num_blocks, block_size)
        step = runner.prepare_decode(Choice(plan, batch), chunks, [context] * batch)

        def read(count: int) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(count):
                runner.send(step)
                runner.run(step)
            end.record()
            wait(end)
            return begin.elapsed_time(end) * 1e-3 / count

        read(1)  # captures and warms up
        count = max(1, round(READING_SECONDS / read(1)))
        return settled_seconds(lambda: read(count))

    return timer


def steady_chunks(count: int, context: int, num_blocks: int, block_size: int) -> list[Chunk]:
    """A decode step of `count` sequences that have `context` tokens each, at least 1.

    Their KV blocks are scattered over all `num_blocks`, and shared only if these are not enough.
    """
    needed = -(-context // block_size)
    rng = np.random.default_rng(0)
    blocks = 1 + np.resize(rng.permutation(num_blocks), (count, needed))  # block 0 is padding
    return [dummy_chunk(context - 1, context, table) for table in blocks.tolist()]
