"""What a model shows the engine of itself: a list of stages, which micro-batches run through.

Running `Model.stages()` in order for a micro-batch IS the model. What a layer is made of is the
model's own business; a plan (engine/plan.py) maps the names of stages to lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nanovllm.layers.attention import DecodeMetadata, PrefillMetadata


@dataclass(frozen=True)
class MixedMetadata:
    """Rows of both kinds: first those that decode, then the tokens of prompts.

    Attributes:
        slot_mapping: int32 [T], of all of them.
        decode: of the first rows.
        prefill: of the rest, whose first token is its token 0.
    """

    slot_mapping: torch.Tensor
    decode: DecodeMetadata
    prefill: PrefillMetadata


@dataclass(eq=False)
class MicroBatch:
    """Rows on their way through the layers.

    Every field below is written by one stage of a layer and replaced by the same stage of a later
    layer: that is what lets lanes share memory without copies (see engine/pipeline_scheduler.py).

    Attributes:
        index: number within the step.
        inputs: has `input_ids` and `positions`, integer [T], and `metadata` of attention.
        x: what the first stage of a layer reads, at last the hidden states after the final norm.
        residual, q, attn_out: between stages.
    """

    index: int
    inputs: Any
    x: Any = None
    residual: torch.Tensor | None = None
    q: torch.Tensor | None = None
    attn_out: torch.Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """A part of one layer.

    Attributes:
        name: "qkv", "attention" or "mlp": what a plan maps to a lane.
        layer: from 0.
        run: issues its kernels for a micro-batch on the current stream.
    """

    name: str
    layer: int
    run: Callable[[MicroBatch], None]


class Model(Protocol):
    """What the engine asks of a model."""

    def stages(self) -> list[Stage]:
        """All stages of all layers, in the order in which they are the model."""

    def compute_logits(
        self, hidden_states: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, hidden_size] to logits [T, vocab_size], in `out` if it is given."""
