"""Runs every kernel once at start-up, so that no request waits for one to be compiled.

Triton compiles a kernel when it first meets some sizes. Which sizes those are, the kernels say:
tilings of prefill attention, and row counts of the linear layers up to some hundred tokens.
Captured decode steps need nothing here, as each is run before it is captured. All ranks run the
same steps, since steps contain collectives; only the first rank draws tokens.

What is not met: a pipeline without CUDA graphs plans its linear layers for the FFN's SMs, and where
that makes other tiles than all SMs do, they are compiled in its first step of that size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanovllm.engine.cuda_graphs import batch_sizes
from nanovllm.sampling_params import SamplingParams

# All that is drawn in different ways: without a limit, with one of them, with both.
SAMPLING = [
    SamplingParams(temperature=0),
    SamplingParams(top_k=1),
    SamplingParams(top_p=0.5),
    SamplingParams(top_k=1, top_p=0.5),
]


def warm_up(
    prefill: Callable[[list[int]], torch.Tensor],
    lengths: list[int],
    draw: Callable[[torch.Tensor, list[SamplingParams]], object] | None,
    decode: Callable[[int], object] | None,
    max_num_seqs: int,
    max_num_tokens: int,
) -> None:
    """Runs prefill steps, decode steps and draws of all kinds.

    Args:
        prefill: runs a step of sequences of these lengths; returns their logits.
        lengths: of sequences, so that every kernel of a prefill step is met.
        draw: draws a token from every row of logits, with the options of each; None: on ranks that
            do not draw.
        decode: runs a step of so many sequences; None: they are captured later.
        max_num_seqs: sequences of a step.
        max_num_tokens: tokens of a prefill step.
    """
    for length in sorted({min(length, max_num_tokens) for length in lengths}):
        logits = prefill([length])
    if decode is not None:
        sizes = batch_sizes(max_num_seqs)
        for size in [*sizes[:5], *sizes[5:][-1:]]:
            decode(size)
    if draw is not None:
        for params in SAMPLING:
            draw(logits, [params])
