"""Attention of one new token per sequence over the paged KV cache: the decode step's kernel.

Decoding reads every cached key and value once and computes little, so the floor is
``2 * sum(context_lens) * Hkv * D`` elements over the memory bandwidth. Reaching it takes every SM
busy to the end, whatever the lengths. The work is therefore cut into equal shares of KV tiles,
not into sequences:

- An item is one (sequence, KV head) pair, ``ceil(context_len / TILE)`` tiles of keys and values
  which serve all query heads of the group. All tiles of all items are numbered in order.
- A fixed grid of ``num_sms * ctas_per_sm`` programs divides these numbers into equal contiguous
  shares. Program c of G takes tiles ``c * total // G`` up to ``(c + 1) * total // G``. It finds
  its place from ``tile_offsets``, a prefix sum that the host computes once a step.
- An item inside one share is finished on the spot. An item cut by share borders leaves one
  partial result in each share it touches, and a second kernel averages them, weighted by their
  softmax sums (Dao et al., "Flash-Decoding", 2023; equal shares as in "Stream-K", Osama et al.,
  2023, arXiv:2301.03598).

A share begins and ends inside at most two cut items, so two partials a program are enough. The
grid and every shape are fixed: in a replayed CUDA graph only the values of ``context_lens``,
``tile_offsets`` and ``block_tables`` change.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.paging import block_of, tile_rows

TILE = 64
_MERGE_CHUNK = 16


@dataclass(frozen=True)
class DecodeTuning:
    """How the decode kernel is compiled and spread over the SMs.

    Args:
        tile: tokens of a KV tile, a power of two, at least 16.
        ctas_per_sm: programs per SM of the partition.
        num_warps: warps of a program.
        num_stages: depth of Triton's software pipeline over the tiles.
        tma: load tiles with the bulk copy engine (Hopper; block_size a multiple of the tile).
    """

    tile: int = TILE
    ctas_per_sm: int = 3
    num_warps: int = 4
    num_stages: int = 3
    tma: bool = False


class DecodeWorkspace:
    """The grid of the decode kernel on a partition of the GPU, and its buffers for partial results.

    Args:
        num_sms: SMs that the kernel may use, the partition's or the whole device's.
        num_q_heads: Hq.
        num_kv_heads: Hkv, a divisor of Hq.
        head_dim: D, a power of two from 32 to 256.
        device: where the buffers live: float32, ``2 * num_programs * Hq / Hkv * (D + 1)``.
        tuning: see ``DecodeTuning``.

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
        self.tuning = tuning or DecodeTuning()
        self.num_kv_heads = num_kv_heads
        self.group = num_q_heads // num_kv_heads
        self.num_programs = num_sms * self.tuning.ctas_per_sm
        slots = 2 * self.num_programs
        self.partial_out = torch.empty(
            slots, self.group, head_dim, dtype=torch.float32, device=device
        )
        self.partial_lse = torch.empty(slots, self.group, dtype=torch.float32, device=device)


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
    num_seqs, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    tuning, group = workspace.tuning, workspace.group
    q = q.contiguous()
    out = torch.empty_like(q)
    if num_seqs == 0:
        return out
    keys, values = k_cache, v_cache
    if tuning.tma:
        keys, values = (_descriptor(cache, tuning.tile) for cache in (k_cache, v_cache))
    _decode_kernel[(workspace.num_programs,)](
        q,
        keys,
        values,
        out,
        workspace.partial_out,
        workspace.partial_lse,
        block_tables,
        context_lens,
        tile_offsets,
        scale * math.log2(math.e),
        num_seqs,
        block_tables.stride(0),
        KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        TILE=tuning.tile,
        TMA=tuning.tma,
        num_warps=tuning.num_warps,
        # Two stages of keys and values wider than this do not fit into shared memory.
        num_stages=tuning.num_stages if head_dim * q.element_size() <= 512 else 2,
    )
    _merge_kernel[(num_seqs, num_q_heads)](
        out,
        workspace.partial_out,
        workspace.partial_lse,
        tile_offsets,
        num_seqs,
        workspace.num_programs,
        KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        CHUNK=_MERGE_CHUNK,
        num_warps=4,
    )
    return out


def _descriptor(cache: Tensor, tile: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in the older Tritons

    head_dim, block_size = cache.shape[3], cache.shape[2]
    if block_size % tile:
        raise ValueError(f"block_size is {block_size}; with TMA it must be a multiple of {tile}")
    return TensorDescriptor.from_tensor(cache.view(-1, head_dim), [tile, head_dim])


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def _decode_kernel(
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
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
):
    # Tiles are numbered sequence by sequence and, within one, KV head by KV head.
    program = tl.program_id(0)
    total = tl.load(tile_offsets + num_seqs) * KV_HEADS
    position = _share_begin(program, total)
    share_end = _share_begin(program + 1, total)
    seq = _find_sequence(tile_offsets, num_seqs, position // KV_HEADS)

    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, HEAD_DIM)
    lane = tl.arange(0, TILE)
    real = member < GROUP
    while position < share_end:
        # The item that this position lies in, and how much of it is this program's.
        seq_begin = tl.load(tile_offsets + seq) * KV_HEADS
        seq_end = tl.load(tile_offsets + seq + 1) * KV_HEADS
        context_len = tl.load(context_lens + seq)
        item_tiles = (seq_end - seq_begin) // KV_HEADS
        head = (position - seq_begin) // item_tiles
        first = (position - seq_begin) % item_tiles
        last = tl.minimum(item_tiles, first + share_end - position)
        table = block_tables + seq.to(tl.int64) * table_stride

        q_row = (seq.to(tl.int64) * KV_HEADS + head) * GROUP + member
        element = q_row[:, None] * HEAD_DIM + column[None, :]
        query = tl.load(q + element, mask=real[:, None], other=0.0)
        peak = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        weight = tl.zeros([GROUP_PAD], tl.float32)
        acc = tl.zeros([GROUP_PAD, HEAD_DIM], tl.float32)
        block = block_of(table, first * TILE, BLOCK_SIZE)
        for tile in range(first, last):
            start = tile * TILE
            valid = start + lane < context_len
            base, offsets = tile_rows(
                table, block, start, head, context_len, KV_HEADS, BLOCK_SIZE, TILE
            )
            block = block_of(table, tl.minimum(tile + 1, last - 1) * TILE, BLOCK_SIZE)
            if TMA:
                # NOTE: past the context this reads stale slots; they weigh 0, but 0 * NaN is NaN.
                key = k_cache.load([base.to(tl.int32), 0])
                value = v_cache.load([base.to(tl.int32), 0])
            else:
                place = offsets[:, None] * HEAD_DIM + column[None, :]
                key = tl.load(k_cache + base * HEAD_DIM + place, mask=valid[:, None], other=0.0)
                value = tl.load(v_cache + base * HEAD_DIM + place, mask=valid[:, None], other=0.0)
            score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
            score = tl.where(valid[None, :], score, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(score, axis=1))
            prob = tl.exp2(score - new_peak[:, None])
            decay = tl.exp2(peak - new_peak)
            weight = weight * decay + tl.sum(prob, axis=1)
            acc = acc * decay[:, None]
            acc = tl.dot(prob.to(value.dtype), value, acc, input_precision="ieee")
            peak = new_peak
        acc = acc / weight[:, None]

        if last - first == item_tiles:
            tl.store(out + element, acc.to(out.dtype.element_ty), mask=real[:, None])
        else:
            # Slot 1: the item begins in this share; slot 0: it began in an earlier one.
            slot_row = (2 * program + (first == 0).to(tl.int32)) * GROUP + member
            slot = slot_row[:, None] * HEAD_DIM + column[None, :]
            tl.store(partial_out + slot, acc, mask=real[:, None])
            tl.store(partial_lse + slot_row, peak + tl.log2(weight), mask=real)
        position += last - first
        seq += (position == seq_end).to(tl.int32)


@triton.jit(do_not_specialize=["num_seqs", "num_programs"])
def _merge_kernel(
    out,
    partial_out,
    partial_lse,
    tile_offsets,
    num_seqs,
    num_programs,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Join the partial results of one query head of one sequence, if its item was cut."""
    seq = tl.program_id(0)
    q_head = tl.program_id(1)
    total = tl.load(tile_offsets + num_seqs).to(tl.int64) * KV_HEADS
    seq_begin = tl.load(tile_offsets + seq)
    item_tiles = tl.load(tile_offsets + seq + 1) - seq_begin
    begin = seq_begin.to(tl.int64) * KV_HEADS + (q_head // GROUP) * item_tiles
    # Program c holds tile t when c * total // G <= t < (c + 1) * total // G.
    first = ((begin + 1) * num_programs - 1) // total
    last = ((begin + item_tiles) * num_programs - 1) // total
    if first == last:
        return

    column = tl.arange(0, HEAD_DIM)
    peak = tl.full([], float("-inf"), tl.float32)
    weight = tl.zeros([], tl.float32)
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for chunk in range(first, last + 1, CHUNK):
        program = chunk + tl.arange(0, CHUNK)
        # With fewer tiles than programs some shares are empty and their slots are stale.
        empty = (program + 1) * total // num_programs == program * total // num_programs
        wrote = (program <= last) & (empty == 0)
        slot = (2 * program + (program == first).to(tl.int64)) * GROUP + q_head % GROUP
        lse = tl.load(partial_lse + slot, mask=wrote, other=float("-inf"))
        part = tl.load(
            partial_out + slot[:, None] * HEAD_DIM + column[None, :], mask=wrote[:, None], other=0.0
        )
        new_peak = tl.maximum(peak, tl.max(lse, axis=0))
        share = tl.exp2(lse - new_peak)
        decay = tl.exp2(peak - new_peak)
        weight = weight * decay + tl.sum(share, axis=0)
        acc = acc * decay + tl.sum(part * share[:, None], axis=0)
        peak = new_peak
    row = (seq.to(tl.int64) * KV_HEADS * GROUP + q_head) * HEAD_DIM
    tl.store(out + row + column, (acc / weight).to(out.dtype.element_ty))


@triton.jit
def _share_begin(program, total):
    """The first tile of a program's share."""
    return (program.to(tl.int64) * total // tl.num_programs(0)).to(tl.int32)


@triton.jit
def _find_sequence(tile_offsets, num_seqs, tile):
    """The sequence that holds a tile: the last one with ``tile_offsets[seq] <= tile``."""
    low = tl.zeros([], tl.int32)
    high = low + num_seqs
    while low + 1 < high:
        middle = (low + high) // 2
        before = tl.load(tile_offsets + middle) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low
