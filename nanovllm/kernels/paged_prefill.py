"""Causal attention of many new tokens per sequence over the paged KV cache.

FlashAttention-2 (Dao, 2023, arXiv:2307.08691) with keys and values found through the block table.
One program takes a tile of queries of one head and walks over the keys they may see: first the
tiles that all of its queries see whole, without a mask, then those that the diagonal or the end
of the context cuts. Programs with the most keys start first. Floor: ``4 * Hq * D`` flops a pair.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.paging import block_of, tile_rows

_TILES_Q = (16, 32, 64)  # rows of a tile of queries; the least that hold the longest sequence


def paged_prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    max_seqlen_q: int,
    scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """See ``reference.paged_prefill_attention``; the caches and `out` are contiguous.

    The result ``[T, Hq, D]`` goes to `out` if it is given.
    """
    _, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    num_seqs = context_lens.shape[0]
    q = q.contiguous()
    out = torch.empty_like(q) if out is None else out
    if num_seqs == 0 or max_seqlen_q == 0:
        return out
    tile_q, tile_k, num_warps, num_stages = _tiling(head_dim, q.element_size(), max_seqlen_q)
    grid = (num_q_heads, triton.cdiv(max_seqlen_q, tile_q), num_seqs)
    _prefill_kernel[grid](
        q, k_cache, v_cache, out, block_tables, cu_seqlens_q, context_lens,
        scale * math.log2(math.e), block_tables.stride(0),
        KV_HEADS=num_kv_heads, GQA=num_q_heads // num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, TILE_Q=tile_q, TILE_K=tile_k,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    return out


def _tiling(head_dim: int, itemsize: int, max_seqlen_q: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and pipeline stages: what fits an SM."""
    tile_q = next((tile for tile in _TILES_Q if tile >= max_seqlen_q), _TILES_Q[-1])
    if itemsize == 4:  # exact products, not on the tensor cores: for tests, not for speed
        return 16, 16, 4, 2
    if head_dim > 128:
        return tile_q, 32, 4, 2
    return tile_q, 64, 4, 3


# The alignment of tables and lengths varies with the batch, as they are views into one buffer.
@triton.jit(do_not_specialize=["block_tables", "cu_seqlens_q", "context_lens", "table_stride"])
def _prefill_kernel(
    q, k_cache, v_cache, out, block_tables, cu_seqlens_q, context_lens, scale_log2, table_stride,
    KV_HEADS: tl.constexpr, GQA: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
):  # fmt: skip
    q_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = tl.program_id(2)
    row_begin = tl.load(cu_seqlens_q + seq)
    num_rows = tl.load(cu_seqlens_q + seq + 1) - row_begin
    if tile * TILE_Q >= num_rows:
        return
    context_len = tl.load(context_lens + seq)
    table = block_tables + seq.to(tl.int64) * table_stride

    row = tile * TILE_Q + tl.arange(0, TILE_Q)
    column = tl.arange(0, HEAD_DIM)
    real = (row < num_rows)[:, None]
    q_row = (row_begin + row).to(tl.int64) * (KV_HEADS * GQA) + q_head
    element = q_row[:, None] * HEAD_DIM + column[None, :]
    query = tl.load(q + element, mask=real, other=0.0)

    position = context_len - num_rows + row
    lowest = context_len - num_rows + tile * TILE_Q
    # Keys 0..whole are seen by every row; keys up to `end` by some.
    whole = (lowest + 1) // TILE_K * TILE_K
    end = tl.minimum(context_len, lowest + TILE_Q)
    peak = tl.full([TILE_Q], float("-inf"), tl.float32)
    weight = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, HEAD_DIM], tl.float32)
    block = block_of(table, 0, BLOCK_SIZE)
    for start in range(0, whole, TILE_K):
        following = block_of(table, tl.minimum(start + TILE_K, end - 1), BLOCK_SIZE)
        peak, weight, acc = _attend_tile(
            query, k_cache, v_cache, table, block, q_head // GQA, position, start, context_len,
            scale_log2, peak, weight, acc, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE_K, False,
        )  # fmt: skip
        block = following
    for start in range(whole, end, TILE_K):
        following = block_of(table, tl.minimum(start + TILE_K, end - 1), BLOCK_SIZE)
        peak, weight, acc = _attend_tile(
            query, k_cache, v_cache, table, block, q_head // GQA, position, start, context_len,
            scale_log2, peak, weight, acc, KV_HEADS, HEAD_DIM, BLOCK_SIZE, TILE_K, True,
        )  # fmt: skip
        block = following
    acc = acc / weight[:, None]
    tl.store(out + element, acc.to(out.dtype.element_ty), mask=real)


@triton.jit
def _attend_tile(
    query, k_cache, v_cache, table, block, head, position, start, context_len, scale_log2,
    peak, weight, acc,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE_K: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2: returns the new peak, weight and accumulator."""
    column = tl.arange(0, HEAD_DIM)
    base, offsets = tile_rows(table, block, start, head, context_len, KV_HEADS, BLOCK_SIZE, TILE_K)
    k_cache += base * HEAD_DIM
    v_cache += base * HEAD_DIM
    place = offsets[:, None] * HEAD_DIM + column[None, :]
    token = start + tl.arange(0, TILE_K)
    if MASKED:
        # Past the context the cache holds anything, even NaN: it must not be multiplied.
        cached = (token < context_len)[:, None]
        key = tl.load(k_cache + place, mask=cached, other=0.0)
        value = tl.load(v_cache + place, mask=cached, other=0.0)
    else:
        key = tl.load(k_cache + place)
        value = tl.load(v_cache + place)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    if MASKED:
        score = tl.where(token[None, :] <= position[:, None], score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=1))
    prob = tl.exp2(score - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    weight = weight * decay + tl.sum(prob, axis=1)
    acc = acc * decay[:, None]
    acc = tl.dot(prob.to(value.dtype), value, acc, input_precision="ieee")
    return new_peak, weight, acc
