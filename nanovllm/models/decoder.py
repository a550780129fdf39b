"""A decoder with grouped-query attention, rotary positions and a gated MLP, as stages.

    mlp -1      embedding; norm of layer 0
    qkv         QKV projection, norm of the heads, rotation; keys and values go to the KV cache
    attention   attention over the KV cache, and nothing else
    mlp         output projection + residual + norm; gate, up, SiLU; down + residual + next norm

Each line of a stage is one fused kernel where there is one for its sizes. The stages are cut where
nothing can be fused, so that the norm of a layer ends the MLP of the layer before. Which norms and
biases a layer has is in its config, out of the table in architectures.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from nanovllm import kernels
from nanovllm.layers.attention import AttentionBackend, AttentionMetadata, HeadShape, KVCache
from nanovllm.layers.embedding import VocabEmbedding
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import PackedColumnLinear, RowLinear
from nanovllm.layers.parallel import ParallelGroup, Shard, WeightShard
from nanovllm.layers.rotary_embedding import cos_sin_table
from nanovllm.models.config import ModelConfig
from nanovllm.models.stage import BEFORE_LAYERS, MicroBatch, Stage, StepTensors
from nanovllm.models.throwaway_cache import throwaway_cache
from nanovllm.utils.device import cpu_memory_errors


class Attention(nn.Module):
    """Projections around attention, and the KV cache of a layer."""

    kv_cache: KVCache

    def __init__(self, config: ModelConfig, heads: HeadShape, group: ParallelGroup) -> None:
        super().__init__()
        self.heads = heads
        self.eps = config.rms_norm_eps
        kv = Shard.of_kv_heads(config.num_key_value_heads, config.head_dim, group)
        q_width = config.num_attention_heads * config.head_dim
        parts = {"q_proj": Shard.of(q_width, group), "k_proj": kv, "v_proj": kv}
        self.qkv_proj = PackedColumnLinear(config.hidden_size, parts, config.qkv_bias)
        self.o_proj = RowLinear(q_width, config.hidden_size, group, 0, config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, self.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, self.eps) if config.qk_norm else None

    def project(
        self, x: kernels.Normed, positions: Tensor, slots: Tensor, cos_sin: Tensor
    ) -> Tensor:
        """x [T, hidden_size] to queries [T, q heads, head_dim]; keys and values go to the cache.

        `cos_sin`: float32 [max_position, head_dim].
        """
        inputs = kernels.HeadInputs(
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.eps, cos_sin, positions, slots, *self.kv_cache,
            self.heads.num_q_heads, self.heads.num_kv_heads,
        )  # fmt: skip
        return kernels.linear_norm_rope_store(x, self.qkv_proj.weight, self.qkv_proj.bias, inputs)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, group: ParallelGroup) -> None:
        super().__init__()
        shard = Shard.of(config.intermediate_size, group)
        parts = {"gate_proj": shard, "up_proj": shard}
        self.gate_up_proj = PackedColumnLinear(config.hidden_size, parts)
        self.down_proj = RowLinear(config.intermediate_size, config.hidden_size, group, 1)

    def gated(self, x: kernels.Normed) -> Tensor:
        """[T, hidden_size] to [T, this rank's width], which the down projection takes."""
        return kernels.linear_silu_mul(x, self.gate_up_proj.weight)


class DecoderLayer(nn.Module):
    """The weights of one layer."""

    def __init__(self, config: ModelConfig, heads: HeadShape, group: ParallelGroup) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, heads, group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, group)


class Decoder(nn.Module):
    """The weights between token ids and normed hidden states."""

    layers: list[DecoderLayer]

    def __init__(self, config: ModelConfig, heads: HeadShape, group: ParallelGroup) -> None:
        super().__init__()
        self.embed_tokens = VocabEmbedding(config.vocab_size, config.hidden_size, group)
        self.layers = nn.ModuleList(  # type: ignore[assignment]
            DecoderLayer(config, heads, group) for _ in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("cos_sin", torch.empty(0), persistent=False)
        self.cos_sin: Tensor


class DecoderForCausalLM(nn.Module):
    """A decoder with its output head, on one rank of `group`; see `models.stage.Model`.

    The modules have the names that checkpoints give their weights.
    """

    def __init__(
        self, config: ModelConfig, backend: AttentionBackend, group: ParallelGroup
    ) -> None:
        super().__init__()
        self.config = config
        self.backend, self.group = backend, group
        self.model = Decoder(config, backend.heads, group)
        self.lm_head: VocabEmbedding | None = None
        if not config.tie_word_embeddings:
            self.lm_head = VocabEmbedding(config.vocab_size, config.hidden_size, group)
        self.max_length = 0  # until `allocate`
        self.bind_kv_cache(torch.empty(config.num_hidden_layers, 2, 0))

    def stages(self) -> list[Stage]:
        stages = [Stage("mlp", BEFORE_LAYERS, self._embed)]
        for layer in range(len(self.model.layers)):
            stages.append(Stage("qkv", layer, partial(self._project, layer)))
            stages.append(Stage("attention", layer, partial(self._attend, layer)))
            stages.append(Stage("mlp", layer, partial(self._feed_forward, layer)))
        return stages

    def forward(
        self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata | None = None
    ) -> Tensor:
        """Runs all stages: integer [T] to hidden states [T, hidden_size] after the final norm.

        `metadata` says where the tokens stand in the KV cache; None: they are whole sequences, each
        from a position 0 to the next.
        """
        if metadata is None:
            with throwaway_cache(self, positions) as metadata:
                return self(input_ids, positions, metadata)
        batch = MicroBatch(0, StepTensors(input_ids, positions, metadata))
        for stage in self.stages():
            stage.run(batch)
        return batch.x

    def forward_attention(
        self,
        x: Tensor,
        positions: Tensor,
        layer: int = 0,
        metadata: AttentionMetadata | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A layer up to its output projection; with `forward_ffn`, a layer in two calls.

        Kept for the specification, tests/seed_spec.py. The engine runs `stages` instead, which fuse
        more and leave in attention only what reads the KV cache; where nothing is fused, as on the
        CPU, both give the same bits.

        `x`: token ids, integer [T], at layer 0; hidden states [T, hidden_size] after it. Positions
        and metadata are as in `forward`. Returns (hidden_states, residual), both [T, hidden_size].
        """
        if metadata is None:
            with throwaway_cache(self, positions) as metadata:
                return self.forward_attention(x, positions, layer, metadata)
        residual = self.model.embed_tokens(x) if layer == 0 else x
        block = self.model.layers[layer]
        attention = block.self_attn
        normed = kernels.Normed(block.input_layernorm(residual))
        q = attention.project(normed, positions, metadata.slot_mapping, self.model.cos_sin)
        out = self.backend.attend(q, attention.kv_cache, metadata)
        return attention.o_proj(out.flatten(1)), residual

    def forward_ffn(self, hidden_states: Tensor, residual: Tensor, layer: int = 0) -> Tensor:
        """Residual, norm and MLP of `layer`: [T, hidden_size]; after the last, the final norm.

        Kept for the specification, as `forward_attention`.
        """
        block = self.model.layers[layer]
        normed, residual = block.post_attention_layernorm.add(hidden_states, residual)
        hidden_states = block.mlp.down_proj(block.mlp.gated(kernels.Normed(normed))) + residual
        return self.model.norm(hidden_states) if block is self.model.layers[-1] else hidden_states

    def compute_logits(self, hidden_states: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mm(hidden_states, self.head.weight.t(), out=out)

    @property
    def head(self) -> VocabEmbedding:
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    @property
    def vocab_shard(self) -> Shard:
        return self.head.shard

    def bind_kv_cache(self, cache: Tensor) -> None:
        self.kv_cache = cache
        for layer, (keys, values) in zip(self.model.layers, cache, strict=True):
            layer.self_attn.kv_cache = keys, values

    def weight_shards(self) -> dict[str, WeightShard]:
        """Every tensor that a checkpoint must hold, by name, and where this rank's part goes."""
        return {
            name: shard
            for path, module in self.named_modules()
            if isinstance(module, (PackedColumnLinear, RowLinear, RMSNorm, VocabEmbedding))
            for name, shard in module.weight_shards(path)
        }

    def allocate(self, device: torch.device, max_length: int | None = None) -> None:
        """Gives the weights memory, not yet filled, on `device`, and rope a table.

        `max_length`: positions that the model will see; None: all that it was made for. Raises
        MemoryError if they do not fit into the CPU's memory.
        """
        config = self.config
        self.max_length = max_length or config.usable_length
        with cpu_memory_errors(device, f"the weights of {config.sizes()}"):
            self.to_empty(device=device)
            table = cos_sin_table(config.rope, config.head_dim, self.max_length)
            self.model.cos_sin = table.to(device)

    # The stages. NOTE: a stage writes no field but those that `MicroBatch` says are its own.

    def _embed(self, batch: MicroBatch) -> None:
        """Leaves what a layer's MLP leaves to the next layer."""
        norm = self.model.layers[0].input_layernorm
        batch.x, batch.residual = self.model.embed_tokens.normed(
            batch.inputs.input_ids, norm, batch.first_token
        )

    def _project(self, layer: int, batch: MicroBatch) -> None:
        block, inputs = self.model.layers[layer], batch.inputs
        eps, several = block.input_layernorm.eps, self.group.size > 1
        x = kernels.Normed(batch.x, batch.x_squares, eps, after_all_reduce=several)
        batch.q = block.self_attn.project(
            x, inputs.positions, inputs.metadata.slot_mapping, self.model.cos_sin
        )

    def _attend(self, layer: int, batch: MicroBatch) -> None:
        cache = self.model.layers[layer].self_attn.kv_cache
        batch.attn_out = self.backend.attend(batch.q, cache, batch.inputs.metadata)

    def _feed_forward(self, layer: int, batch: MicroBatch) -> None:
        """From attention's output to the next layer's `x`, or the hidden states."""
        block, out = self.model.layers[layer], batch.attn_out.flatten(1)
        x, residual = block.self_attn.o_proj.add_norm(
            out, batch.residual, block.post_attention_layernorm, batch.first_token
        )
        is_last = layer == len(self.model.layers) - 1
        norm = self.model.norm if is_last else self.model.layers[layer + 1].input_layernorm
        # A norm whose division is due could not leave the model.
        x, batch.residual = block.mlp.down_proj.add_norm(
            block.mlp.gated(x), residual, norm, batch.first_token, may_defer=not is_last
        )
        batch.x, batch.x_squares = x.values, x.sum_sq


def make_model(
    config: ModelConfig, backend: AttentionBackend, group: ParallelGroup, dtype: torch.dtype
) -> DecoderForCausalLM:
    """A model without memory for its weights: call `allocate`, and then fill `weight_shards()`."""
    with torch.device("meta"):
        return DecoderForCausalLM(config, backend, group).to(dtype).eval()
