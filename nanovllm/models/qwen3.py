"""Qwen3 (dense), written so that its attention and its FFN can run as two pipeline stages.

A layer is `forward_attention` followed by `forward_ffn`; alternating the two over the layers IS
the model. There are two places to cut between the stages:

    seed cut    attention = norm, QKV, attention, output projection     FFN = norm, MLP
    dense cut   attention = attention over the KV cache                 dense = everything else

The dense cut leaves in the attention stage only what reads the KV cache, and lets every linear
layer fuse with what comes after it: a residual addition and a norm, SiLU, or the norm and rotation
of heads. `Qwen3Model.forward` runs it. Both give the same bits where nothing is fused, as on the
CPU.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from nanovllm import kernels
from nanovllm.kernels import reference
from nanovllm.layers.attention import AttentionBackend, DecodeMetadata, HeadShape, Metadata
from nanovllm.layers.embedding import VocabEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import PackedColumnLinear, RowLinear
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.layers.rotary_embedding import cos_sin_table
from nanovllm.layers.slots import Slots
from nanovllm.models.qwen3_config import Qwen3Config, UnsupportedModelError
from nanovllm.models.stage import MicroBatch, MixedMetadata, Stage


class Qwen3Attention(nn.Module):
    """Grouped-query attention with RMS norm on every query and key head."""

    # Bound by the engine once it has allocated the cache; see layers/attention.py for the layout.
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def __init__(
        self, config: Qwen3Config, backend: AttentionBackend, group: ParallelGroup
    ) -> None:
        super().__init__()
        self.backend = backend
        self.heads = backend.heads
        kv = Shard.kv_heads(config.num_key_value_heads, config.head_dim, group)
        q_width = config.num_attention_heads * config.head_dim
        parts = {"q_proj": Shard.even(q_width, group), "k_proj": kv, "v_proj": kv}
        self.qkv_proj = PackedColumnLinear(config.hidden_size, parts, config.attention_bias)
        self.o_proj = RowLinear(q_width, config.hidden_size, group, config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(
        self,
        x: kernels.Normed,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        metadata: Metadata | None,
    ) -> torch.Tensor:
        """QKV projection, norm of the heads, rotation; keys and values go to the KV cache.

        Args:
            x: [T, hidden_size], normed.
            positions: integer [T].
            cos_sin: float32 [max_position, head_dim].
            metadata: where the tokens stand in the KV cache; None: no cache.

        Returns:
            Queries [T, q heads, head_dim]; without a cache the key and value heads behind them.
        """
        q_heads, kv_heads = self.heads.num_q_heads, self.heads.num_kv_heads
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, cos_sin, positions)
        if metadata is None:
            qkv = self.qkv_proj(x.divided())
            return torch.cat(kernels.qk_norm_rope(qkv, *norms, q_heads, kv_heads), dim=1)
        caches = self.k_cache, self.v_cache
        inputs = kernels.HeadInputs(*norms, metadata.slot_mapping, *caches, q_heads, kv_heads)
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        return kernels.linear_norm_rope_store(x, weight, bias, inputs)

    def attend(
        self, heads: torch.Tensor, positions: torch.Tensor, metadata: Metadata | None
    ) -> torch.Tensor:
        """Attention over the KV cache, or without one over the tokens themselves.

        Args:
            heads: what `project` returned.
            positions: integer [T].
            metadata: as there; None: each position 0 begins a sequence of its own.

        Returns:
            [T, q heads * head_dim].
        """
        if metadata is None:
            counts = [self.heads.num_q_heads, *[self.heads.num_kv_heads] * 2]
            q, k, v = heads.split(counts, dim=1)
            starts = sequence_starts(positions)
            out = reference.causal_attention(q, k, v, starts, self.heads.scale)
        elif isinstance(metadata, DecodeMetadata):
            out = self.backend.decode(heads, self.k_cache, self.v_cache, metadata)
        else:
            out = self.backend.prefill(heads, self.k_cache, self.v_cache, metadata)
        return out.flatten(1)

    def attend_rows(self, batch: MicroBatch) -> None:
        """The stage "attention": q to attn_out, for rows of either kind."""
        q, metadata = batch.q, batch.inputs.metadata
        caches = self.k_cache, self.v_cache
        assert q is not None
        if isinstance(metadata, DecodeMetadata):
            batch.attn_out = self.backend.decode(q, *caches, metadata).flatten(1)
        elif isinstance(metadata, MixedMetadata):
            count = len(metadata.decode.context_lens)
            out = torch.empty_like(q)
            out[:count] = self.backend.decode(q[:count], *caches, metadata.decode)
            out[count:] = self.backend.prefill(q[count:], *caches, metadata.prefill)
            batch.attn_out = out.flatten(1)
        else:
            batch.attn_out = self.attend(q, batch.inputs.positions, metadata)

    def slots(self, prefix: str) -> Slots:
        yield from self.qkv_proj.slots(prefix)
        yield from self.o_proj.slots(f"{prefix}.o_proj")
        yield from self.q_norm.slots(f"{prefix}.q_norm")
        yield from self.k_norm.slots(f"{prefix}.k_norm")


class Qwen3MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Qwen3Config, group: ParallelGroup) -> None:
        super().__init__()
        shard = Shard.even(config.intermediate_size, group)
        parts = {"gate_proj": shard, "up_proj": shard}
        self.gate_up_proj = PackedColumnLinear(config.hidden_size, parts)
        self.down_proj = RowLinear(config.intermediate_size, config.hidden_size, group)

    def forward(self, x: kernels.Normed) -> torch.Tensor:
        """[T, hidden_size] to [T, hidden_size]."""
        return self.down_proj(self._gated(x))

    def add_norm(
        self, x: kernels.Normed, residual: torch.Tensor, norm: RMSNorm
    ) -> tuple[kernels.Normed, torch.Tensor]:
        """Returns (norm of s, s) for s = the output + residual [T, hidden_size], used up by it."""
        return self.down_proj.add_norm(self._gated(x), residual, norm)

    def _gated(self, x: kernels.Normed) -> torch.Tensor:
        return kernels.linear_silu_mul(x, self.gate_up_proj.weight)

    def slots(self, prefix: str) -> Slots:
        yield from self.gate_up_proj.slots(prefix)
        yield from self.down_proj.slots(f"{prefix}.down_proj")


class Qwen3DecoderLayer(nn.Module):
    """One layer, as its two stages."""

    def __init__(
        self, config: Qwen3Config, backend: AttentionBackend, group: ParallelGroup
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Qwen3Attention(config, backend, group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen3MLP(config, group)

    def forward_attention(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        metadata: Metadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, hidden_size] to (attention output, residual), both of that shape."""
        normed = kernels.Normed(self.input_layernorm(hidden_states))
        heads = self.self_attn.project(normed, positions, cos_sin, metadata)
        attended = self.self_attn.attend(heads, positions, metadata)
        return self.self_attn.o_proj(attended), hidden_states

    def forward_ffn(self, hidden_states: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Adds the residual and the FFN: twice [T, hidden_size] to one."""
        normed, residual = self.post_attention_layernorm.add(hidden_states, residual)
        return self.mlp(kernels.Normed(normed)) + residual

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        metadata: Metadata | None = None,
    ) -> torch.Tensor:
        """[T, hidden_size] to [T, hidden_size]: the one stage, then the other."""
        attended, residual = self.forward_attention(hidden_states, positions, cos_sin, metadata)
        return self.forward_ffn(attended, residual)

    def slots(self, prefix: str) -> Slots:
        yield from self.input_layernorm.slots(f"{prefix}.input_layernorm")
        yield from self.self_attn.slots(f"{prefix}.self_attn")
        yield from self.post_attention_layernorm.slots(f"{prefix}.post_attention_layernorm")
        yield from self.mlp.slots(f"{prefix}.mlp")


class Qwen3Model(nn.Module):
    """Token ids to normed hidden states."""

    layers: list[Qwen3DecoderLayer]

    def __init__(
        self, config: Qwen3Config, backend: AttentionBackend, group: ParallelGroup
    ) -> None:
        super().__init__()
        self.embed_tokens = VocabEmbedding(config.vocab_size, config.hidden_size, group)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            Qwen3DecoderLayer(config, backend, group) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("cos_sin", torch.empty(0), persistent=False)
        self.cos_sin: torch.Tensor

    # The seed cut.

    def forward_attention(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        layer: int = 0,
        metadata: Metadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention stage of `layer`.

        Args:
            x: token ids, integer [T], at layer 0; hidden states [T, hidden_size] after it.
            positions: integer [T].
            layer: from 0.
            metadata: as in `Qwen3Attention.project`.

        Returns:
            (hidden_states, residual), both [T, hidden_size].
        """
        hidden_states = self.embed_tokens(x) if layer == 0 else x
        return self.layers[layer].forward_attention(
            hidden_states, positions, self.cos_sin, metadata
        )

    def forward_ffn(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, layer: int = 0
    ) -> torch.Tensor:
        """FFN stage of `layer`: [T, hidden_size]; the last layer's ends with the final norm."""
        hidden_states = self.layers[layer].forward_ffn(hidden_states, residual)
        return self.norm(hidden_states) if layer == len(self.layers) - 1 else hidden_states

    # The dense cut.

    def begin(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: Metadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and positions [T] to (heads of layer 0, residual)."""
        residual = self.embed_tokens(input_ids)
        first = self.layers[0]
        normed = kernels.Normed(first.input_layernorm(residual))
        return first.self_attn.project(normed, positions, self.cos_sin, metadata), residual

    def attend(
        self,
        layer: int,
        heads: torch.Tensor,
        positions: torch.Tensor,
        metadata: Metadata | None = None,
    ) -> torch.Tensor:
        """Heads of `layer` to its attention output [T, q heads * head_dim]."""
        return self.layers[layer].self_attn.attend(heads, positions, metadata)

    def dense(
        self,
        layer: int,
        attended: torch.Tensor,
        residual: torch.Tensor,
        positions: torch.Tensor,
        metadata: Metadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From the attention output of `layer` to (heads of the next layer, new residual).

        The residual given is used up: the new one may be written over it.
        After the last layer it is (hidden states after the final norm, residual).
        """
        block = self.layers[layer]
        normed, residual = block.self_attn.o_proj.add_norm(
            attended, residual, block.post_attention_layernorm
        )
        if layer == len(self.layers) - 1:
            # A norm whose division is due could not leave the model, so this one is not fused.
            return self.norm.add(block.mlp(normed), residual)
        following = self.layers[layer + 1]
        normed, residual = block.mlp.add_norm(normed, residual, following.input_layernorm)
        return following.self_attn.project(normed, positions, self.cos_sin, metadata), residual

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: Metadata | None = None,
    ) -> torch.Tensor:
        """Token ids and positions [T] to hidden states [T, hidden_size] after the final norm."""
        state, residual = self.begin(input_ids, positions, metadata)
        for layer in range(len(self.layers)):
            attended = self.attend(layer, state, positions, metadata)
            state, residual = self.dense(layer, attended, residual, positions, metadata)
        return state

    def stages(self) -> list[Stage]:
        """The dense cut as a list: qkv, attention and mlp of each layer."""
        stages = []
        for number, layer in enumerate(self.layers):
            if number == 0:
                stages.append(Stage("embed", 0, self._embed))
            stages += [
                Stage("qkv", number, partial(self._qkv, layer)),
                Stage("attention", number, layer.self_attn.attend_rows),
                Stage("mlp", number, partial(self._mlp, number)),
            ]
        return stages

    def _embed(self, batch: MicroBatch) -> None:
        batch.residual = self.embed_tokens(batch.inputs.input_ids)
        batch.x = kernels.Normed(self.layers[0].input_layernorm(batch.residual))

    def _qkv(self, layer: Qwen3DecoderLayer, batch: MicroBatch) -> None:
        inputs = batch.inputs
        batch.q = layer.self_attn.project(batch.x, inputs.positions, self.cos_sin, inputs.metadata)

    def _mlp(self, number: int, batch: MicroBatch) -> None:
        layer = self.layers[number]
        assert batch.attn_out is not None
        assert batch.residual is not None
        x, residual = layer.self_attn.o_proj.add_norm(
            batch.attn_out, batch.residual, layer.post_attention_layernorm
        )
        if number == len(self.layers) - 1:
            # A norm whose division is due could not leave the model, so this one is not fused.
            batch.x, batch.residual = self.norm.add(layer.mlp(x), residual)
        else:
            following = self.layers[number + 1].input_layernorm
            batch.x, batch.residual = layer.mlp.add_norm(x, residual, following)

    def slots(self, prefix: str) -> Slots:
        yield from self.embed_tokens.slots(f"{prefix}.embed_tokens")
        for index, layer in enumerate(self.layers):
            yield from layer.slots(f"{prefix}.layers.{index}")
        yield from self.norm.slots(f"{prefix}.norm")


class Qwen3ForCausalLM(nn.Module):
    """Qwen3 with its output head, on one rank of `group`."""

    def __init__(
        self, config: Qwen3Config, backend: AttentionBackend, group: ParallelGroup
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Qwen3Model(config, backend, group)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else VocabEmbedding(config.vocab_size, config.hidden_size, group)
        )

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

    @property
    def num_layers(self) -> int:
        return len(self.model.layers)

    def forward_attention(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        layer: int = 0,
        metadata: Metadata | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Qwen3Model.forward_attention`."""
        return self.model.forward_attention(x, positions, layer, metadata)

    def forward_ffn(
        self, hidden_states: torch.Tensor, residual: torch.Tensor, layer: int = 0
    ) -> torch.Tensor:
        """See `Qwen3Model.forward_ffn`."""
        return self.model.forward_ffn(hidden_states, residual, layer)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        metadata: Metadata | None = None,
    ) -> torch.Tensor:
        """See `Qwen3Model.forward`."""
        return self.model(input_ids, positions, metadata)

    def stages(self) -> list[Stage]:
        """See `models/stage.py`."""
        return self.model.stages()

    def compute_logits(
        self, hidden_states: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, hidden_size] to logits [T, vocab_size], in `out` if it is given."""
        if out is None:
            out = hidden_states.new_empty(len(hidden_states), self.config.vocab_size)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        head.logits(hidden_states, out)
        return out

    def linear_row_counts(self) -> list[int]:
        """See `kernels.linear_row_counts`."""
        attention, mlp = self.model.layers[0].self_attn, self.model.layers[0].mlp
        return kernels.linear_row_counts(
            paired=[attention.qkv_proj.weight, mlp.gate_up_proj.weight],
            split=[attention.o_proj.weight, mlp.down_proj.weight],
        )

    def bind_kv_cache(self, cache: torch.Tensor) -> None:
        """Gives each layer its part of [layers, 2, blocks, kv_heads, block_size, head_dim]."""
        for layer, (k_cache, v_cache) in zip(self.model.layers, cache, strict=True):
            layer.self_attn.k_cache, layer.self_attn.v_cache = k_cache, v_cache

    def slots(self) -> Slots:
        """Every tensor that a checkpoint must hold, with its destination."""
        yield from self.model.slots("model")
        if self.lm_head is not None:
            yield from self.lm_head.slots("lm_head")


def rank_heads(config: Qwen3Config, group: ParallelGroup) -> HeadShape:
    """Attention heads of one rank.

    Raises:
        UnsupportedModelError: the model cannot be split evenly over the ranks.
    """
    size, kv_heads = group.size, config.num_key_value_heads
    for name in ("num_attention_heads", "intermediate_size"):
        if getattr(config, name) % size:
            raise UnsupportedModelError(
                f"tensor_parallel_size={size} does not divide {name}={getattr(config, name)}"
            )
    if kv_heads % size and size % kv_heads:
        raise UnsupportedModelError(
            f"tensor_parallel_size={size} neither divides nor is a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
    return HeadShape(config.num_attention_heads // size, max(kv_heads // size, 1), config.head_dim)


def sequence_starts(positions: torch.Tensor) -> torch.Tensor:
    """int32 [N + 1]: the first token of each sequence, where each position 0 begins one."""
    starts = (positions == 0).nonzero().flatten()
    ends = positions.new_tensor([0, positions.numel()])
    return torch.cat([ends[:1], starts[starts > 0], ends[1:]]).to(torch.int32)
