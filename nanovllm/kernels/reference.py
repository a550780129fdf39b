"""The slow, obvious form of the model's kernels, in plain torch on any device.

Each function has the name of its fast counterpart, which the tests hold against it. The CPU engine
runs on these. Arithmetic is in float32 and rounded on the way out. Attention loops over sequences,
so that none depends on the others of its batch.

Shapes: T tokens, N sequences, Hq query heads, Hkv key/value heads, D head_dim. A layer's cache is
``k_cache, v_cache [num_blocks, Hkv, block_size, D]``; a token's slot is
``block_id * block_size + offset``.
"""

import torch
from torch import Tensor

from nanovllm.kernels.normed import HeadInputs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` of ``x [..., H]`` (arXiv:1910.07467)."""
    return _rms_norm32(x, weight, eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``rms_norm(s), s`` of ``s = x + residual``, rounded to the dtype before it is normalised."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``gate_up [T, 2I]``, whose first half is the gate -> ``[T, I]``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


def _rms_norm32(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()


# ------------------------------------------------------------------ between QKV and attention


def qk_norm_rope(qkv: Tensor, inputs: HeadInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Split a QKV projection; normalise (if there are weights) and rotate q and k head by head.

    ``qkv [T, (Hq + 2 Hkv) * D]`` -> ``q [T, Hq, D]``, ``k [T, Hkv, D]``, ``v [T, Hkv, D]``.

    The rotation pairs element i with element i + D/2, as Hugging Face transformers does, not
    neighbours as in the paper (Su et al., "RoFormer", 2021, arXiv:2104.09864).
    """
    counts = [inputs.num_q_heads, inputs.num_kv_heads, inputs.num_kv_heads]
    q, k, v = qkv.unflatten(-1, (sum(counts), -1)).split(counts, dim=1)
    cos, sin = inputs.cos_sin[inputs.positions].unsqueeze(1).chunk(2, dim=-1)

    def norm_rope(x: Tensor, weight: Tensor | None) -> Tensor:
        x32 = x.float() if weight is None else _rms_norm32(x, weight, inputs.eps)
        x1, x2 = x32.chunk(2, dim=-1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)

    return norm_rope(q, inputs.q_weight), norm_rope(k, inputs.k_weight), v.contiguous()


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write ``k, v [T, Hkv, D]`` to the cache slots ``slot_mapping [T]`` (int64)."""
    block_size = k_cache.shape[2]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    k_cache[block, :, offset] = k
    v_cache[block, :, offset] = v


def qk_norm_rope_store(qkv: Tensor, inputs: HeadInputs) -> Tensor:
    """``qk_norm_rope`` and then ``store_kv``; returns ``q [T, Hq, D]``."""
    q, k, v = qk_norm_rope(qkv, inputs)
    store_kv(k, v, inputs.k_cache, inputs.v_cache, inputs.slot_mapping)
    return q


# ------------------------------------------------------------------ attention


def paged_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
) -> Tensor:
    """Causal attention of many new tokens per sequence over cached keys and values.

    Args:
        q: ``[T, Hq, D]``; sequence n owns rows ``cu_seqlens_q[n]`` to ``cu_seqlens_q[n + 1]``,
            the last ones of its ``context_lens[n]`` tokens, all of which are in the cache.
        block_tables: ``[N, max_blocks]`` int32, the cache blocks of each sequence in order.
        cu_seqlens_q, context_lens: int32 ``[N + 1]`` and ``[N]``.
        max_seqlen_q: most rows that one sequence has here (only the fast kernel needs it).
        scale: factor on the scores, usually ``D ** -0.5``.

    Returns:
        ``[T, Hq, D]`` in q's dtype; rows that belong to no sequence are undefined.
    """
    out = torch.zeros_like(q)
    starts = cu_seqlens_q.tolist()
    for n, length in enumerate(context_lens.tolist()):
        rows = slice(starts[n], starts[n + 1])
        k = _cached(k_cache, block_tables[n], length)
        v = _cached(v_cache, block_tables[n], length)
        out[rows] = _attend(q[rows], k, v, scale)
    return out


def _cached(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first ``length`` tokens of one sequence, ``[Hkv, length, D]``."""
    block_size = cache.shape[2]
    table = block_table[: -(-length // block_size)].long()
    blocks = cache[:, :, :length][table]  # [blocks, Hkv, block_size, D], or less of a single one
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence: ``q [Lq, Hq, D]`` are the last Lq positions of ``k, v [Hkv, Lk, D]``."""
    num_queries, num_q_heads, head_dim = q.shape
    num_kv_heads, num_keys, _ = k.shape
    # Query head h reads key/value head h // (Hq / Hkv): [Hkv, group, Lq, D].
    grouped = q.float().transpose(0, 1).reshape(num_kv_heads, -1, num_queries, head_dim)
    scores = grouped @ k.float().unsqueeze(1).transpose(-1, -2) * scale
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    visible = visible.tril(num_keys - num_queries)
    probs = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    out = probs @ v.float().unsqueeze(1)
    return out.reshape(num_q_heads, num_queries, head_dim).transpose(0, 1).to(q.dtype)


def resolve_tokens(input_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """Replace every id below 0, which is ``-1 - request_index``, by that request's last token.

    ``input_ids [N]``, ``last_tokens [requests]`` int64 -> ``[N]`` int64. Where nothing could be
    drawn, the last token is -1, and 0 takes its place: the row still needs a token to go on.
    """
    requests = (-1 - input_ids).clamp(min=0).long()
    return torch.where(input_ids < 0, last_tokens[requests], input_ids.long()).clamp(min=0)
