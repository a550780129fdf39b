"""What the engine knows of a model: stages that carry micro-batches through its layers.

    mlp -1   qkv 0   attention 0   mlp 0   qkv 1   attention 1   mlp 1   ...   mlp L-1

Run in this order, the stages of a micro-batch are the model. Where each runs, and what runs beside
it, is the engine's business; what a layer is made of is the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanovllm.layers.attention import AttentionBackend, AttentionMetadata
from nanovllm.layers.parallel import Shard

# Layer number of the work before the first layer.
BEFORE_LAYERS = -1


@dataclass(frozen=True)
class StepTensors:
    """What a model is called with: T tokens.

    Attributes:
        input_ids, positions: integer [T].
        metadata: where the tokens stand in the KV cache.
    """

    input_ids: Tensor
    positions: Tensor
    metadata: AttentionMetadata


@dataclass(eq=False)
class MicroBatch:
    """T tokens on their way through the layers, and what the stages hand on to each other.

    Every field has one stage that writes it, and holds its tensor until the same stage of the next
    layer replaces it. So the lane that made a tensor frees it, after the readers of that tensor.

    Attributes:
        index: which of the step's micro-batches.
        first_token: its first token's place among all of the step's.
        inputs: its tokens.
        x: [T, hidden_size], by "mlp": normed for the layer that comes next. In the end: after the
            final norm, the hidden states.
        x_squares: float32 [T, parts], by "mlp": sums of squares if the norm's division of `x` is
            still due (see `kernels.Normed`), else None.
        residual: [T, hidden_size], by "mlp".
        q: [T, heads, head_dim], by "qkv".
        attn_out: [T, heads, head_dim], by "attention".
    """

    index: int
    inputs: StepTensors
    first_token: int = 0
    x: Tensor | None = None
    x_squares: Tensor | None = None
    residual: Tensor | None = None
    q: Tensor | None = None
    attn_out: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """A part of a layer.

    Attributes:
        name: its kind, by which a plan gives it a lane.
        layer: from 0, or BEFORE_LAYERS.
        run: issues its kernels on the current stream; reads and writes the micro-batch's fields.
    """

    name: str
    layer: int
    run: Callable[[MicroBatch], None]


class Model(Protocol):
    """What the engine asks of a model.

    Attributes:
        backend: of its attention.
        kv_cache: as bound, [layers, 2, blocks, kv_heads, block_size, head_dim].
        max_length: positions are below it.
    """

    backend: AttentionBackend
    kv_cache: Tensor
    max_length: int

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
