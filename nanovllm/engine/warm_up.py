"""Runs every kernel once at start-up, so that no request waits for one to be compiled.

Triton compiles a kernel when it first meets some sizes. What tiles a kernel takes changes at powers
of two and at multiples of 16 rows, up to some hundred, so prompts of these lengths meet all; two
layers stand for the others. Captured decode steps are run before their capture. All ranks run the
same steps and draws, since these contain collectives.

Not met: a pipeline without CUDA graphs, whose linear layers may take other tiles on a lane's SMs.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nanovllm.config import Config
from nanovllm.engine.graph_memory import batch_sizes
from nanovllm.engine.pipeline_scheduler import hidden_states
from nanovllm.engine.step_inputs import dummy_chunk, micro_batches
from nanovllm.engine.step_runner import StepRunner
from nanovllm.layers.peer_memory import MOST_ROWS as PEER_ROWS
from nanovllm.layers.split_threshold import MOST_CANDIDATES
from nanovllm.models.stage import BEFORE_LAYERS
from nanovllm.sampling_params import SamplingParams

# Rows from which on the tiles of no kernel change any more.
MOST_ROWS = 512
# One for each way through the sampler, from the model's logits and from changed copies.
SAMPLING = [
    replace(params, logit_bias=bias, logprobs=scored)
    for bias, scored in ((None, 1), ({0: 0.0}, None))
    for params in (
        SamplingParams(temperature=0),
        SamplingParams(top_k=1),
        SamplingParams(top_k=MOST_CANDIDATES + 1),
        SamplingParams(top_p=0.5),
        SamplingParams(top_k=1, top_p=0.5),
    )
]


@torch.inference_mode()
def warm_up(steps: StepRunner, config: Config, max_prompt: int) -> torch.Tensor:
    """Runs prompts of up to `max_prompt` tokens and decode steps, all in the padding block.

    Returns logits [1, this rank's part of the vocabulary] to draw from, with `SAMPLING`.
    """
    sizes = batch_sizes(min(MOST_ROWS, max_prompt))
    if config.tensor_parallel_size > 1:  # an all-reduce has further ways for more rows
        sizes += [rows for rows in (PEER_ROWS // 2, PEER_ROWS) if rows <= max_prompt]
    for rows in sizes:
        logits = _run_outer_layers(steps, rows)
    if config.enforce_eager:
        sizes = batch_sizes(config.max_num_seqs)
        for size in [*sizes[:5], *sizes[5:][-1:]]:
            steps.run_padding(size)
    return logits


def _run_outer_layers(steps: StepRunner, rows: int) -> torch.Tensor:
    """Runs a prompt through the first and the last layer; returns logits [1, vocab_size]."""
    model = steps.schedulers[0].model
    step = steps.prepare_prompts([dummy_chunk(0, rows)])
    inputs = step.flat.to(steps.device)
    workspace = steps.schedulers[0].workspace  # a prompt of one token is a decode row
    (batch,), sampled = micro_batches(step.layout, inputs, steps.last_tokens, workspace)
    stages = model.stages()
    for stage in stages:
        if stage.layer in (BEFORE_LAYERS, 0, stages[-1].layer):
            stage.run(batch)
    return model.compute_logits(hidden_states([batch])[sampled])
