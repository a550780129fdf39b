"""Qwen3 (dense): a decoder with norms of its query and key heads.

`forward_attention` and `forward_ffn` run a layer in two calls, as the original specification has
it: everything up to the output projection, and the rest. The engine runs `stages` instead, which
fuse more and leave in attention only what reads the KV cache; where nothing is fused, as on the
CPU, both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nanovllm import kernels
from nanovllm.layers.attention import AttentionBackend, AttentionMetadata
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.rotary_embedding import cos_sin_table
from nanovllm.layers.slots import Slot
from nanovllm.models.decoder import DecoderForCausalLM, DecoderKind
from nanovllm.models.qwen3_config import Qwen3Config
from nanovllm.models.throwaway_cache import throwaway_cache
from nanovllm.utils.memory import cpu_memory_errors


class Qwen3ForCausalLM(DecoderForCausalLM):
    """Qwen3 with its output head, on one rank of `group`."""

    def __init__(
        self, config: Qwen3Config, backend: AttentionBackend, group: ParallelGroup
    ) -> None:
        bias = config.attention_bias
        kind = DecoderKind(qk_norm=True, qkv_bias=bias, o_bias=bias)
        super().__init__(config, kind, backend, group)

    @classmethod
    def allocate(
        cls,
        config: Qwen3Config,
        backend: AttentionBackend,
        group: ParallelGroup,
        device: torch.device,
        dtype: torch.dtype,
        *,
        max_length: int | None = None,
        check: Callable[[dict[str, Slot]], object] = lambda slots: None,
    ) -> Qwen3ForCausalLM:
        """Builds the model with uninitialised weights on `device`; a loader fills `slots()`.

        Args:
            config: shape of the model.
            backend: attention back end of all layers.
            group: this rank and the others.
            device: of the weights.
            dtype: of the weights.
            max_length: positions that the model will see; None: all that it was made for.
            check: called with the slots before they have memory; what it raises ends it here.

        Raises:
            MemoryError: the weights do not fit into the CPU's memory.
        """
        with torch.device("meta"):
            model = cls(config, backend, group).to(dtype)
        check(dict(model.slots()))
        with cpu_memory_errors(device, f"the weights of {config.sizes()}"):
            model = model.to_empty(device=device)
            length = config.usable_length if max_length is None else max_length
            model.model.cos_sin = cos_sin_table(config.rope, config.head_dim, length).to(device)
        return model.eval()

    def forward_attention(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        layer: int = 0,
        metadata: AttentionMetadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norm, QKV projection, attention and output projection of `layer`.

        Args:
            x: token ids, integer [T], at layer 0; hidden states [T, hidden_size] after it.
            positions: integer [T].
            layer: from 0.
            metadata: as in `forward`.

        Returns:
            (hidden_states, residual), both [T, hidden_size].
        """
        if metadata is None:
            with throwaway_cache(self, positions) as metadata:
                return self.forward_attention(x, positions, layer, metadata)
        residual = self.model.embed_tokens(x) if layer == 0 else x
        block = self.model.layers[layer]
        attention = block.self_attn
        normed = kernels.Normed(block.input_layernorm(residual))
        q = attention.project(normed, positions, metadata.slot_mapping, self.model.cos_sin)
        out = self.backend.attend(q, attention.k_cache, attention.v_cache, metadata)
        return attention.o_proj(out.flatten(1)), residual

    def forward_ffn(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, layer: int = 0
    ) -> torch.Tensor:
        """Residual, norm and MLP of `layer`: [T, hidden_size]; after the last, the final norm."""
        block = self.model.layers[layer]
        normed, residual = block.post_attention_layernorm.add(hidden_states, residual)
        hidden_states = block.mlp.down_proj(block.mlp.gated(kernels.Normed(normed))) + residual
        return self.model.norm(hidden_states) if block is self.model.layers[-1] else hidden_states
