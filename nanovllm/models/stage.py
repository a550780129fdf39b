"""What the engine knows of a model: stages that carry micro-batches through its layers.

    mlp -1   qkv 0   attention 0   mlp 0   qkv 1   attention 1   mlp 1   ...   mlp L-1

Run in this order, the stages of a micro-batch are the model. Where each runs, and what runs beside
it, is the engine's business; what a layer is made of is the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.layers.attention import AttentionBackend, AttentionMetadata
from nanovllm.layers.parallel import Shard

# Layer number of the work before the first layer.
BEFORE_LAYERS = -1


@dataclass(frozen=True)
class StepTensors:
    """What a model is called with: T tokens."""

    input_ids: Tensor  # integer [T]
    positions: Tensor  # integer [T]
    metadata: AttentionMetadata  # where the tokens stand in the KV cache


@dataclass(eq=False)
class MicroBatch:
    """T tokens on their way through the layers, and what the stages hand on to each other.

    Every field has one stage that writes it, and holds its tensor until the same stage of the next
    layer replaces it. So the lane that made a tensor frees it, after the readers of that tensor.
    """

    index: int  # which of the step's micro-batches
    inputs: StepTensors
    first_token: int = 0  # place of its first token among all of the step's
    # By "mlp": [T, hidden_size], normed for the next layer; in the end, the hidden states.
    x: Tensor = field(init=False)
    # By "mlp": float32 [T, parts] if the norm's division of `x` is still due, see `kernels.Normed`.
    x_squares: Tensor | None = None
    residual: Tensor = field(init=False)  # by "mlp": [T, hidden_size]
    q: Tensor = field(init=False)  # by "qkv": [T, heads, head_dim]
    attn_out: Tensor = field(init=False)  # by "attention": [T, heads, head_dim]


@dataclass(frozen=True)
class Stage:
    """A part of a layer."""

    name: str  # its kind, by which a plan gives it a lane
    layer: int  # from 0, or BEFORE_LAYERS
    # Issues its kernels on the current stream; reads and writes the micro-batch's fields.
    run: Callable[[MicroBatch], None]


class Model(Protocol):
    """What the engine asks of a model."""

    backend: AttentionBackend
    kv_cache: Tensor  # as bound, [layers, 2, blocks, kv_heads, block_size, head_dim]
    max_length: int  # positions are below it

    def stages(self) -> list[Stage]:
        """All stages in the order of execution; `x` of the last is the hidden states."""

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        """[T, hidden_size] to logits [T, this rank's part], in `out` if it is given."""

    @property
    def vocab_shard(self) -> Shard:
        """This rank's part of the vocabulary."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """All weights of this rank."""

    def bind_kv_cache(self, cache: Tensor) -> None:
        """Gives each layer its part of [layers, 2, blocks, kv_heads, block_size, head_dim]."""
