"""Qwen3 (dense): a decoder with norms of its query and key heads.

`forward_attention` and `forward_ffn` run a layer in two calls, as the original specification has
it: everything up to the output projection, and the rest. The engine runs `stages` instead, which
fuse more and leave in attention only what reads the KV cache; where nothing is fused, as on the
CPU, both give the same bits.
"""

from __future__ import annotations

import torch

from nanovllm import kernels
from nanovllm.layers.attention import AttentionBackend, AttentionMetadata
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.layers.rotary_embedding import cos_sin_table
from nanovllm.models.decoder import DecoderForCausalLM, DecoderKind
from nanovllm.models.qwen3_config import Qwen3Config
from nanovllm.models.throwaway_cache import throwaway_cache


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
    ) -> Qwen3ForCausalLM:
        """Builds the model with uninitialised weights on `device`; a loader fills `slots()`."""
        with torch.device("meta"):
            model = cls(config, backend, group)
        model = model.to(dtype).to_empty(device=device)
        table = cos_sin_table(config.rope, config.head_dim, config.max_position_embeddings)
        model.model.cos_sin = table.to(device)
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
