"""Attention of one new token per sequence over the paged KV cache: the decode step's kernel.

Decoding reads every cached key and value once and computes little, so the floor is
``2 * sum(context_lens) * Hkv * D`` elements over the memory bandwidth. Reaching it takes every SM
busy to the end, whatever the lengths. The work is therefore cut into equal shares of KV tiles,
not into sequences:

- An item is one (sequence, KV head) pair, ``ceil(context_len / TILE)`` tiles of keys and values
  which serve all query heads of the group. All tiles of all items are numbered in order.
- A fixed grid of ``num_sms * ctas_per_sm`` programs divides these numbers into equal contiguous
  shares of at least MIN_SHARE tiles; programs beyond the last share exit. A program finds its
  place from ``tile_offsets``, a prefix sum that the host computes once a step.
- An item inside one share is finished on the spot. An item cut by share borders leaves one
  partial result in each share it touches. The program that stores the last of them joins them,
  weighted by their softmax sums (Dao et al., "Flash-Decoding", 2023; equal shares and joining by
  the last arriver as in "Stream-K", Osama et al., 2023, arXiv:2301.03598).

A share begins and ends inside at most two cut items, so two partials a program are enough. The
grid and every shape are fixed: in a replayed CUDA graph only the values of ``context_lens``,
``tile_offsets`` and ``block_tables`` change.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels import pdl
from nanovllm.kernels.paging import block_of, tile_rows

TILE = 64


@dataclass(frozen=True)
class DecodeTuning:
    """How the decode kernel is compiled and spread over the SMs.

    Args:
        tile: tokens of a KV tile, a power of two, at least 16.
        ctas_per_sm: programs per SM of the partition.
        num_warps: warps of a program.
        num_stages: depth of Triton's software pipeline over the tiles.
        tma: load tiles with the bulk copy engine (Hopper), where the block size is a multiple of
            the tile.
        min_share: tiles that a program takes at least.
        flat: one loop over a program's tiles, which keeps loading from item to item, instead of
            a loop over its items around one over an item's tiles.
        min_rows: query rows of a product at least; 16 is what every Triton can multiply, fewer
            take less shared memory.
        evict_first: mark cached keys and values as the first to leave L2 (without TMA only).
    """

    tile: int = TILE
    ctas_per_sm: int = 4
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    min_share: int = 2
    flat: bool = False
    min_rows: int = 16
    evict_first: bool = False


def tuning_for(num_sms: int) -> DecodeTuning:
    """The fastest measured tuning for a partition of ``num_sms`` SMs.

    On an H200 (bf16, head_dim 128, 512 sequences of 100 to 1116 tokens, TB/s on 16/32/64/96/132
    SMs): TMA with 5 programs of 2 warps 1.06/2.03/3.44/3.56/3.90; plain loads with 4 programs of
    4 warps 0.84/1.63/3.02/3.78/4.07. A small partition lacks bytes in flight, which TMA keeps up
    with fewer threads; on most of the device plain loads win, which read only existing tokens.
    """
    if num_sms <= 80 and _has_tma():
        return DecodeTuning(ctas_per_sm=5, num_warps=2, tma=True)
    return DecodeTuning()


def _has_tma() -> bool:
    has_descriptors = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return has_descriptors and hopper


class DecodeWorkspace:
    """The grid of the decode kernel on a partition of the GPU, and its buffers for partial results.

    Args:
        num_sms: SMs that the kernel may use, the partition's or the whole device's.
        num_q_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq.
        head_dim: D, a power of two from 32 to 256.
        device: where the buffers live: ``2 * num_programs * Hq / Hkv * (D + 1)`` float32 and
            num_programs int32.
        tuning: default ``tuning_for(num_sms)``.

    Raises:
        ValueError: for a size outside these limits.
    """

    # NOTE: launches that may run at the same time (two streams) need a workspace each.
    def __init__(
        self,
        num_sms: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        tuning: DecodeTuning | None = None,
    ) -> None:
        if num_sms < 1:
            raise ValueError(f"num_sms is {num_sms}; it must be at least 1")
        if num_kv_heads < 1 or num_q_heads % num_kv_heads:
            raise ValueError(f"num_q_heads {num_q_heads} is no multiple of {num_kv_heads} KV heads")
        if head_dim not in (32, 64, 128, 256):
            raise ValueError(f"head_dim is {head_dim}; it must be 32, 64, 128 or 256")
        self.tuning = tuning or tuning_for(num_sms)
        self.num_kv_heads = num_kv_heads
        self.group = num_q_heads // num_kv_heads
        self.num_programs = num_sms * self.tuning.ctas_per_sm
        slots = 2 * self.num_programs
        self.partial_out = torch.empty(
            slots, self.group, head_dim, dtype=torch.float32, device=device
        )
        self.partial_lse = torch.empty(slots, self.group, dtype=torch.float32, device=device)
        # Partials stored so far of the cut item that begins in a program's share; 0 between
        # launches, because whoever joins an item resets its count.
        self.arrivals = torch.zeros(self.num_programs, dtype=torch.int32, device=device)


def tile_offsets(context_lens: np.ndarray, tile: int = TILE) -> np.ndarray:
    """Number of KV tiles before each sequence: ``[N]`` ints -> ``[N + 1]`` int32 (on the host).

    Raises:
        ValueError: for a context length under 1 (padded rows have length 1).
    """
    if context_lens.min(initial=1) < 1:
        raise ValueError(f"context_lens has {context_lens.min()}; every length must be at least 1")
    offsets = np.zeros(len(context_lens) + 1, dtype=np.int32)
    np.cumsum((context_lens + (tile - 1)) // tile, out=offsets[1:])
    return offsets


def paged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    tile_offsets: Tensor,
    workspace: DecodeWorkspace,
) -> Tensor:
    """Attention of one new token per sequence; see ``reference.paged_decode_attention``.

    Args:
        q: ``[N, Hq, D]``.
        k_cache, v_cache: ``[num_blocks, Hkv, block_size, D]``, contiguous.
        block_tables: ``[N, max_blocks]`` int32.
        context_lens: ``[N]`` int32.
        tile_offsets: ``[N + 1]`` int32, ``tile_offsets(context_lens, workspace.tuning.tile)``
            on the device.
        workspace: made for these head counts; used by one launch at a time.

    Returns:
        ``[N, Hq, D]`` in q's dtype.
    """
    num_seqs, _, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    tuning, group = workspace.tuning, workspace.group
    q = q.contiguous()
    out = torch.empty_like(q)
    if num_seqs == 0:
        return out
    keys, values = k_cache, v_cache
    tma = tuning.tma and block_size % tuning.tile == 0
    if tma:
        keys, values = (_descriptor(cache, tuning.tile) for cache in (k_cache, v_cache))
    _decode_kernel[(workspace.num_programs,)](
        q,
        keys,
        values,
        out,
        workspace.partial_out,
        workspace.partial_lse,
        workspace.arrivals,
        block_tables,
        context_lens,
        tile_offsets,
        scale * math.log2(math.e),
        num_seqs,
        block_tables.stride(0),
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PAD=max(tuning.min_rows, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=tuning.tile,
        MIN_SHARE=tuning.min_share,
        TMA=tma,
        FLAT=tuning.flat,
        EVICT="evict_first" if tuning.evict_first else "",
        JOIN_GROUP=triton.next_power_of_2(group),
        JOIN_CHUNK=max(16 * tuning.num_warps // triton.next_power_of_2(group), 1),
        num_warps=tuning.num_warps,
        # So that all programs of an SM fit into its 65536 registers.
        maxnreg=min(65536 // (32 * tuning.num_warps * tuning.ctas_per_sm) // 8 * 8, 248),
        # Two stages of keys and values wider than this do not fit into shared memory.
        num_stages=tuning.num_stages if head_dim * q.element_size() <= 512 else 2,
        **pdl.options(q),
    )
    return out


def _descriptor(cache: Tensor, tile: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in the older Tritons

    head_dim = cache.shape[3]
    return TensorDescriptor.from_tensor(cache.view(-1, head_dim), [tile, head_dim])


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_lse,
    arrivals,
    block_tables,
    context_lens,
    tile_offsets,
    scale_log2,
    num_seqs,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MIN_SHARE: tl.constexpr,
    TMA: tl.constexpr,
    FLAT: tl.constexpr,
    EVICT: tl.constexpr,
    JOIN_GROUP: tl.constexpr,
    JOIN_CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    pdl.let_next_start(PDL)
    pdl.wait_for_inputs(PDL)
    # Tiles are numbered sequence by sequence and, within one, KV head by KV head.
    program = tl.program_id(0)
    total = tl.load(tile_offsets + num_seqs) * KV_HEADS
    begin = _share_begin(program, total, MIN_SHARE)
    end = _share_begin(program + 1, total, MIN_SHARE)
    if begin == end:
        return
    first_seq = _find_sequence(tile_offsets, num_seqs, begin // KV_HEADS)
    if FLAT:
        last_seq = _attend_tiles(
            q, k_cache, v_cache, out, partial_out, partial_lse, block_tables, context_lens,
            tile_offsets, scale_log2, num_seqs, table_stride, begin, end, first_seq,
            KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, BLOCK_SIZE, TILE, TMA, EVICT,
        )  # fmt: skip
    else:
        last_seq = _attend_items(
            q, k_cache, v_cache, out, partial_out, partial_lse, block_tables, context_lens,
            tile_offsets, scale_log2, num_seqs, table_stride, begin, end, first_seq,
            KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, BLOCK_SIZE, TILE, TMA, EVICT,
        )  # fmt: skip

    # At most two items of a share are cut: the one it begins in and the one it ends in.
    tl.debug_barrier()  # all partials are stored before one thread announces them
    joined = total
    for side in range(2):
        seq = tl.where(side == 0, first_seq, last_seq)
        seq_begin = tl.load(tile_offsets + seq) * KV_HEADS
        item_tiles = tl.load(tile_offsets + seq + 1) - tl.load(tile_offsets + seq)
        head = (tl.where(side == 0, begin, end - 1) - seq_begin) // item_tiles
        item_begin = seq_begin + head * item_tiles
        first = _share_of(item_begin, total, MIN_SHARE)
        last = _share_of(item_begin + item_tiles - 1, total, MIN_SHARE)
        if (first < last) & (item_begin != joined):
            arrived = tl.atomic_add(arrivals + first, 1, sem="acq_rel", scope="gpu")
            if arrived == last - first:
                tl.store(arrivals + first, 0)
                row = (seq.to(tl.int64) * KV_HEADS + head) * GROUP
                _join_partials(
                    out + row * HEAD_DIM, partial_out, partial_lse, first, last,
                    GROUP, JOIN_GROUP, HEAD_DIM, JOIN_CHUNK,
                )  # fmt: skip
        joined = item_begin


@triton.jit
def _attend_tiles(
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_lse,
    block_tables,
    context_lens,
    tile_offsets,
    scale_log2,
    num_seqs,
    table_stride,
    begin,
    end,
    seq,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Attend to tiles begin..end, of which the first is of sequence ``seq``; returns the last's.

    One loop runs through all items, so that the loads of the next item's first tiles are under
    way while the last tiles of the one before are computed. The lengths and blocks that a tile's
    addresses depend on are looked up one more step ahead.
    """
    context_len = tl.load(context_lens + seq)
    item_tiles = (context_len + TILE - 1) // TILE
    within = begin - tl.load(tile_offsets + seq) * KV_HEADS
    head = within // item_tiles
    tile = within % item_tiles
    block = block_of(block_tables + seq.to(tl.int64) * table_stride, tile * TILE, BLOCK_SIZE)
    next_seq, next_head, next_tile = _tile_after(
        seq, head, tile, context_len, num_seqs, KV_HEADS, TILE
    )
    next_len = tl.load(context_lens + next_seq)
    next_table = block_tables + next_seq.to(tl.int64) * table_stride
    next_block = block_of(next_table, next_tile * TILE, BLOCK_SIZE)

    peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
    weight = tl.zeros([GROUP_PAD, TILE], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_DIM], tl.float32)
    for position in range(begin, end):
        peak, weight, acc = _attend_tile(
            q, k_cache, v_cache, block_tables + seq.to(tl.int64) * table_stride, block, seq, head,
            tile * TILE, context_len, scale_log2, peak, weight, acc,
            KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, BLOCK_SIZE, TILE, TMA, EVICT,
        )  # fmt: skip
        item_ends = (tile + 1) * TILE >= context_len
        if item_ends | (position == end - 1):
            begins_here = position - tile >= begin
            _store_result(
                out, partial_out, partial_lse, seq * KV_HEADS + head, item_ends & begins_here,
                begins_here, peak, weight, acc, GROUP, HEAD_DIM,
            )  # fmt: skip
            peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
            weight = tl.zeros([GROUP_PAD, TILE], tl.float32)
            acc = tl.zeros([GROUP_PAD, HEAD_DIM], tl.float32)
        # NOTE: not plain assignments, for which Triton would not pipeline the loop.
        more = position < end - 1
        seq = tl.where(more, next_seq, seq)
        head = tl.where(more, next_head, head)
        tile = tl.where(more, next_tile, tile)
        context_len = tl.where(more, next_len, context_len)
        block = tl.where(more, next_block, block)
        next_seq, next_head, next_tile = _tile_after(
            seq, head, tile, context_len, num_seqs, KV_HEADS, TILE
        )
        next_len = tl.load(context_lens + next_seq)
        next_table = block_tables + next_seq.to(tl.int64) * table_stride
        next_block = block_of(next_table, next_tile * TILE, BLOCK_SIZE)
    return seq


@triton.jit
def _tile_after(seq, head, tile, context_len, num_seqs, KV_HEADS: tl.constexpr, TILE: tl.constexpr):
    """The next tile: of this item, of the next KV head's, or of the next sequence's."""
    item_ends = (tile + 1) * TILE >= context_len
    tile = tl.where(item_ends, 0, tile + 1)
    head += item_ends.to(tl.int32)
    seq = tl.minimum(seq + (head == KV_HEADS).to(tl.int32), num_seqs - 1)
    return seq, tl.where(head == KV_HEADS, 0, head), tile


@triton.jit
def _attend_items(
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_lse,
    block_tables,
    context_lens,
    tile_offsets,
    scale_log2,
    num_seqs,
    table_stride,
    begin,
    end,
    seq,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    EVICT: tl.constexpr,
):
    """The same as ``_attend_tiles`` by a loop over items around one over an item's tiles."""
    position = begin
    last_seq = seq
    while position < end:
        context_len = tl.load(context_lens + seq)
        item_tiles = (context_len + TILE - 1) // TILE
        within = position - tl.load(tile_offsets + seq) * KV_HEADS
        head = within // item_tiles
        first = within % item_tiles
        last = tl.minimum(item_tiles, first + end - position)
        table = block_tables + seq.to(tl.int64) * table_stride
        peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        weight = tl.zeros([GROUP_PAD, TILE], tl.float32)
        acc = tl.zeros([GROUP_PAD, HEAD_DIM], tl.float32)
        block = block_of(table, first * TILE, BLOCK_SIZE)
        for tile in range(first, last):
            following = block_of(table, tl.minimum(tile + 1, last - 1) * TILE, BLOCK_SIZE)
            peak, weight, acc = _attend_tile(
                q, k_cache, v_cache, table, block, seq, head, tile * TILE, context_len,
                scale_log2, peak, weight, acc,
                KV_HEADS, GROUP, GROUP_PAD, HEAD_DIM, BLOCK_SIZE, TILE, TMA, EVICT,
            )  # fmt: skip
            block = following
        _store_result(
            out, partial_out, partial_lse, seq * KV_HEADS + head, last - first == item_tiles,
            first == 0, peak, weight, acc, GROUP, HEAD_DIM,
        )  # fmt: skip
        last_seq = seq
        position += last - first
        seq += ((last == item_tiles) & (head == KV_HEADS - 1)).to(tl.int32)
    return last_seq


@triton.jit
def _attend_tile(
    q,
    k_cache,
    v_cache,
    table,
    block,
    seq,
    head,
    start,
    context_len,
    scale_log2,
    peak,
    weight,
    acc,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    EVICT: tl.constexpr,
):
    """One step of the online softmax, in base 2: returns the new peak, weight and accumulator.

    ``weight`` keeps a sum for each column of a tile; adding them up can wait to the item's end.
    """
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, HEAD_DIM)
    q_row = (seq.to(tl.int64) * KV_HEADS + head) * GROUP + member
    real = (member < GROUP)[:, None]
    query = tl.load(q + q_row[:, None] * HEAD_DIM + column[None, :], mask=real, other=0.0)
    valid = start + tl.arange(0, TILE) < context_len
    base, offsets = tile_rows(table, block, start, head, context_len, KV_HEADS, BLOCK_SIZE, TILE)
    if TMA:
        # NOTE: past the context this reads stale slots; they weigh 0, but 0 * NaN is NaN.
        key = k_cache.load([base.to(tl.int32), 0])
        value = v_cache.load([base.to(tl.int32), 0])
    else:
        place = offsets[:, None] * HEAD_DIM + column[None, :]
        cached = valid[:, None]
        keys, values = k_cache + base * HEAD_DIM, v_cache + base * HEAD_DIM
        key = tl.load(keys + place, mask=cached, other=0.0, eviction_policy=EVICT)
        value = tl.load(values + place, mask=cached, other=0.0, eviction_policy=EVICT)
    score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
    score = tl.where(valid[None, :], score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=1))
    prob = tl.exp2(score - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)[:, None]
    acc = tl.dot(prob.to(value.dtype), value, acc * decay, input_precision="ieee")
    return new_peak, weight * decay + prob, acc


@triton.jit
def _store_result(
    out,
    partial_out,
    partial_lse,
    item,
    is_whole,
    begins_here,
    peak,
    weight,
    acc,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Write an item's output, or what this share knows of it: to slot 1 if it begins here."""
    member = tl.arange(0, acc.shape[0])
    column = tl.arange(0, HEAD_DIM)[None, :]
    real = member < GROUP
    total = tl.sum(weight, axis=1)
    acc = acc / total[:, None]
    if is_whole:
        q_row = item.to(tl.int64) * GROUP + member
        place = out + q_row[:, None] * HEAD_DIM + column
        tl.store(place, acc.to(out.dtype.element_ty), mask=real[:, None])
    else:
        slot_row = (2 * tl.program_id(0) + begins_here.to(tl.int32)) * GROUP + member
        tl.store(partial_out + slot_row[:, None] * HEAD_DIM + column, acc, mask=real[:, None])
        tl.store(partial_lse + slot_row, peak + tl.log2(total), mask=real)


@triton.jit
def _join_partials(
    out,
    partial_out,
    partial_lse,
    first,
    last,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Average what the shares first..last know of an item into its rows ``out [GROUP, D]``."""
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, HEAD_DIM)
    real = member < GROUP
    peak = tl.full([GROUP_PAD], -3.0e38, tl.float32)
    weight = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, HEAD_DIM], tl.float32)
    for chunk in range(first, last + 1, CHUNK):
        share = chunk + tl.arange(0, CHUNK)
        row = (2 * share + (share == first).to(tl.int32))[:, None] * GROUP + member[None, :]
        wrote = (share <= last)[:, None] & real[None, :]
        # NOTE: from L2 (".cg"), where the other programs' stores are; L1 may hold older values.
        lse = tl.load(partial_lse + row, mask=wrote, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            partial_out + row[:, :, None] * HEAD_DIM + column[None, None, :],
            mask=wrote[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        portion = tl.exp2(lse - new_peak[None, :])
        decay = tl.exp2(peak - new_peak)
        weight = weight * decay + tl.sum(portion, axis=0)
        acc = acc * decay[:, None] + tl.sum(part * portion[:, :, None], axis=0)
        peak = new_peak
    place = out + member[:, None] * HEAD_DIM + column[None, :]
    acc = acc / tl.where(real, weight, 1.0)[:, None]
    tl.store(place, acc.to(out.dtype.element_ty), mask=real[:, None])


@triton.jit
def _num_shares(total, MIN_SHARE: tl.constexpr):
    return tl.minimum(tl.num_programs(0), tl.maximum(total // MIN_SHARE, 1))


@triton.jit
def _share_begin(share, total, MIN_SHARE: tl.constexpr):
    """The first tile of a share; ``total`` for those beyond the last."""
    count = _num_shares(total, MIN_SHARE)
    # The first total % count shares have one tile more than the others.
    share = tl.minimum(share, count)
    return share * (total // count) + tl.minimum(share, total % count)


@triton.jit
def _share_of(tile, total, MIN_SHARE: tl.constexpr):
    """The share that holds a tile."""
    count = _num_shares(total, MIN_SHARE)
    size, larger = total // count, total % count
    return tl.where(
        tile < larger * (size + 1),
        tile // (size + 1),
        larger + (tile - larger * (size + 1)) // size,
    )


@triton.jit
def _find_sequence(tile_offsets, num_seqs, tile, CHUNK: tl.constexpr = 512):
    """The sequence that holds a tile: the last one with ``tile_offsets[seq] <= tile``."""
    begun = tl.zeros([], tl.int32)
    for chunk in range(0, num_seqs, CHUNK):
        seq = chunk + tl.arange(0, CHUNK)
        offset = tl.load(tile_offsets + seq, mask=seq < num_seqs, other=2**31 - 1)
        begun += tl.sum((offset <= tile).to(tl.int32), axis=0)
    return begun - 1
