"""Attention of one new token per sequence over the paged KV cache: the decode step's kernel.

Decoding reads every cached key and value once: the floor is ``2 * sum(context_lens) * Hkv * D``
elements. Reaching it takes every SM busy to the end, whatever the lengths. So the work is divided
as in stream-K (Osama et al., 2023, arXiv:2301.03598): into equal ranges of KV tiles.

- A tile group is one (sequence, KV head) pair: ``ceil(context_len / TILE)`` tiles of keys and
  values, which serve all query heads of the KV head. All tiles are numbered in order.
- A fixed grid of ``num_sms * ctas_per_sm`` programs divides these numbers into equal contiguous
  ranges. A program finds its place from ``tile_offsets``, a prefix sum that the host computes, and
  then runs one loop over its tiles, so that it keeps loading from group to group.
- A group inside one range is finished on the spot. One that is split by range borders leaves a
  partial result in each range. The program that stores the last of them combines them, weighted by
  their softmax sums (Dao et al., "Flash-Decoding", 2023).

Each end of a range splits at most one group, so two partials per program are enough. All of it is
one launch of a fixed grid: in a replayed CUDA graph only values of the integer inputs change.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanovllm.kernels.gpu import is_hopper_or_newer
from nanovllm.kernels.paging import block_of, tile_rows
from nanovllm.kernels.pdl import pdl_options, pdl_trigger, pdl_wait
from nanovllm.kernels.stream_k import combine_partials, find_sequence, range_begin, tile_after

TILE = 64


@dataclass(frozen=True)
class DecodeTuning:
    """How the decode kernel is compiled and spread over the SMs."""

    ctas_per_sm: int
    num_warps: int
    num_stages: int  # of Triton's software pipeline over the tiles
    tma: bool  # tiles come by the bulk copy engine (Hopper)
    # Keys and values are the left operands: their rows are tokens and head dimensions, and query
    # heads are the right ones' columns. Tensor cores take 16 rows and 8 columns at a time, so the
    # query heads of a KV head are padded to 8 instead of 16.
    keys_first: bool = False


PLAIN = DecodeTuning(ctas_per_sm=3, num_warps=4, num_stages=3, tma=False)
TMA = DecodeTuning(ctas_per_sm=6, num_warps=2, num_stages=2, tma=True)
KEYS_FIRST = DecodeTuning(ctas_per_sm=6, num_warps=1, num_stages=2, tma=True, keys_first=True)
MANY_SMS = 80


def tuning_for(num_sms: int, num_groups: int, gqa: int) -> DecodeTuning:
    """The fastest for `num_groups` (sequence, KV head) pairs with `gqa` query heads a KV head."""
    if not is_hopper_or_newer():
        return PLAIN
    # `keys_first` halves the tensor cores' work, and a program of one warp waits for no other. But
    # where many SMs share few groups, each has many partial results: more threads combine faster.
    many_parts = num_sms > MANY_SMS and num_groups <= num_sms
    return TMA if many_parts and gqa <= 4 else KEYS_FIRST


class DecodeWorkspace:
    """How many SMs the decode kernel may use, and its buffers for partial results.

    `tuning` is for every launch; None: ``tuning_for`` its size.

    NOTE: launches that may run at the same time (two streams) need a workspace each.
    """

    def __init__(
        self,
        num_sms: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        tuning: DecodeTuning | None = None,
    ) -> None:
        self.num_sms = num_sms
        self.tuning = tuning
        programs = num_sms * max(t.ctas_per_sm for t in (PLAIN, TMA, KEYS_FIRST, tuning or PLAIN))
        gqa = num_q_heads // num_kv_heads
        empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
        self.partial_out = empty(2 * programs, gqa, head_dim)
        self.partial_lse = empty(2 * programs, gqa)
        # Partials stored so far of the split group that begins in a program's range; 0 between
        # launches, because whoever combines a group resets its count.
        self.arrivals = torch.zeros(programs, dtype=torch.int32, device=device)


def tile_offsets(context_lens: np.ndarray) -> np.ndarray:
    """Number of KV tiles before each sequence: ``[N]`` ints -> ``[N + 1]`` int32 (on the host).

    A length of 0 gives a row no tiles, so that the kernel skips it: padding, after all others.
    """
    offsets = np.zeros(len(context_lens) + 1, dtype=np.int32)
    ((context_lens + (TILE - 1)) // TILE).cumsum(out=offsets[1:])
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
    out: Tensor | None = None,
) -> Tensor:
    """``reference.paged_prefill_attention`` of one row a sequence, ``q [N, Hq, D]``.

    The caches and `out` are contiguous.

    NOTE: tables, lengths and offsets must not come from the kernel issued just before. They are
    read before it has ended; see ``pdl``.

    Args:
        tile_offsets: ``[N + 1]`` int32, ``tile_offsets(context_lens)`` on the device. The last
            sequences may have no tiles: they are padding, and their output is left undefined.
        workspace: made for these head counts; used by one launch at a time.
        out: for the result ``[N, Hq, D]``; None: a new tensor.
    """
    num_seqs, num_q_heads, head_dim = q.shape
    _, num_kv_heads, block_size, _ = k_cache.shape
    q = q.contiguous()
    out = torch.empty_like(q) if out is None else out
    if num_seqs == 0:
        return out
    gqa = num_q_heads // num_kv_heads
    tuning = workspace.tuning or tuning_for(workspace.num_sms, num_seqs * num_kv_heads, gqa)
    if tuning.tma and block_size % TILE:
        tuning = PLAIN  # tiles straddle blocks
    keys, values = (_descriptor(c) if tuning.tma else c for c in (k_cache, v_cache))
    _decode_kernel[(workspace.num_sms * tuning.ctas_per_sm,)](
        q, keys, values, out, workspace.partial_out, workspace.partial_lse, workspace.arrivals,
        block_tables, context_lens, tile_offsets,
        scale * math.log2(math.e), num_seqs, block_tables.stride(0),
        **kernel_options(tuning, num_kv_heads, gqa, head_dim, block_size, q.element_size()),
        **pdl_options(),
    )  # fmt: skip
    return out


def kernel_options(
    tuning: DecodeTuning, num_kv_heads: int, gqa: int, head_dim: int, block_size: int,
    element_size: int,
) -> dict[str, int]:  # fmt: skip
    """What the kernel is compiled for: its constants and the compiler's options."""
    combine_pad = triton.next_power_of_2(gqa)
    threads = 32 * tuning.num_warps
    return {
        "KV_HEADS": num_kv_heads, "GQA": gqa, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size,
        "GQA_PAD": max(combine_pad, 8 if tuning.keys_first else 1),
        "TILE": TILE, "TMA": tuning.tma,
        # The axis of a tile's tokens in scores, and of the head dimension in sums.
        "AXIS": 0 if tuning.keys_first else 1,
        "COMBINE_PAD": combine_pad,
        "COMBINE_CHUNK": max(16 * tuning.num_warps // combine_pad, 1),
        "num_warps": tuning.num_warps,
        # So that all programs of an SM fit into its 65536 registers.
        "maxnreg": min(65536 // (threads * tuning.ctas_per_sm) // 8 * 8, 248),
        # More stages of keys and values wider than this do not fit into shared memory.
        "num_stages": tuning.num_stages if head_dim * element_size <= 512 else 2,
    }  # fmt: skip


def _descriptor(cache: Tensor) -> TensorDescriptor:
    """The cache as tiles ``[num_blocks * Hkv * block_size / TILE, TILE, D]``, to copy one each."""
    head_dim = cache.shape[3]
    return TensorDescriptor.from_tensor(cache.view(-1, TILE, head_dim), [1, TILE, head_dim])


# The alignment of tables and lengths varies with the batch, as they are views into one buffer.
@triton.jit(
    do_not_specialize=[
        "block_tables", "context_lens", "tile_offsets", "num_seqs", "table_stride",
    ]
)  # fmt: skip
def _decode_kernel(
    q, k_cache, v_cache, out, partial_out, partial_lse, arrivals,
    block_tables, context_lens, tile_offsets, scale_log2, num_seqs, table_stride,
    KV_HEADS: tl.constexpr, GQA: tl.constexpr, GQA_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr, AXIS: tl.constexpr,
    COMBINE_PAD: tl.constexpr, COMBINE_CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    total = tl.load(tile_offsets + num_seqs) * KV_HEADS
    begin = range_begin(program, total)
    end = range_begin(program + 1, total)
    if begin == end:
        pdl_wait(PDL)
        return
    seq = find_sequence(tile_offsets, num_seqs, begin // KV_HEADS)

    # The loads of a group's first tiles are under way while the last tiles of the one before are
    # computed. The lengths and blocks that a tile's addresses depend on are looked up one more
    # step ahead.
    context_len = tl.load(context_lens + seq)
    first_tiles = (context_len + TILE - 1) // TILE
    within = begin - tl.load(tile_offsets + seq) * KV_HEADS
    head = within // first_tiles
    tile = within % first_tiles
    first_group = seq * KV_HEADS + head
    first_begin = begin - tile
    block = block_of(block_tables + seq.to(tl.int64) * table_stride, tile * TILE, BLOCK_SIZE)
    next_seq, next_head, next_tile = tile_after(
        seq, head, tile, context_len, num_seqs, KV_HEADS, TILE
    )
    next_len = tl.load(context_lens + next_seq)
    next_table = block_tables + next_seq.to(tl.int64) * table_stride
    next_block = block_of(next_table, next_tile * TILE, BLOCK_SIZE)

    # So far only inputs of the step were read; from here on, queries, keys and values are.
    pdl_wait(PDL)
    peak, weight, acc = _nothing_attended(GQA_PAD, HEAD_DIM, TILE, AXIS)
    # NOTE: no nested `while`: Triton 3.6 gave its result `seq` the value from before the loop.
    for position in range(begin, end):
        peak, weight, acc = _attend_tile(
            q, k_cache, v_cache, block_tables + seq.to(tl.int64) * table_stride, block, seq, head,
            tile * TILE, context_len, scale_log2, peak, weight, acc,
            KV_HEADS, GQA, GQA_PAD, HEAD_DIM, BLOCK_SIZE, TILE, TMA, AXIS,
        )  # fmt: skip
        group_ends = (tile + 1) * TILE >= context_len
        if group_ends | (position == end - 1):
            begins_here = position - tile >= begin
            _store_result(
                out, partial_out, partial_lse, seq * KV_HEADS + head, group_ends & begins_here,
                begins_here, peak, weight, acc, GQA, GQA_PAD, HEAD_DIM, AXIS,
            )  # fmt: skip
            peak, weight, acc = _nothing_attended(GQA_PAD, HEAD_DIM, TILE, AXIS)
        # NOTE: not plain assignments, for which Triton would not pipeline the loop.
        more = position < end - 1
        seq = tl.where(more, next_seq, seq)
        head = tl.where(more, next_head, head)
        tile = tl.where(more, next_tile, tile)
        context_len = tl.where(more, next_len, context_len)
        block = tl.where(more, next_block, block)
        next_seq, next_head, next_tile = tile_after(
            seq, head, tile, context_len, num_seqs, KV_HEADS, TILE
        )
        next_len = tl.load(context_lens + next_seq)
        next_table = block_tables + next_seq.to(tl.int64) * table_stride
        next_block = block_of(next_table, next_tile * TILE, BLOCK_SIZE)

    pdl_trigger(PDL)
    combine_partials(
        out, partial_out, partial_lse, arrivals, total, first_group, first_begin, first_tiles,
        seq * KV_HEADS + head, end - 1 - tile, (context_len + TILE - 1) // TILE,
        GQA, COMBINE_PAD, HEAD_DIM, COMBINE_CHUNK,
    )  # fmt: skip


@triton.jit
def _nothing_attended(
    GQA_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, AXIS: tl.constexpr
):
    """Peak, weight and accumulator before a group's first tile."""
    peak = tl.full([GQA_PAD], float("-inf"), tl.float32)
    if AXIS == 0:
        weight = tl.zeros([TILE, GQA_PAD], tl.float32)
        acc = tl.zeros([HEAD_DIM, GQA_PAD], tl.float32)
    else:
        weight = tl.zeros([GQA_PAD, TILE], tl.float32)
        acc = tl.zeros([GQA_PAD, HEAD_DIM], tl.float32)
    return peak, weight, acc


@triton.jit
def _attend_tile(
    q, k_cache, v_cache, table, block, seq, head, start, context_len, scale_log2,
    peak, weight, acc,
    KV_HEADS: tl.constexpr, GQA: tl.constexpr, GQA_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2: returns the new peak, weight and accumulator.

    ``weight`` keeps a sum for each token of a tile; adding them up can wait to the group's end.
    """
    member = tl.arange(0, GQA_PAD)
    column = tl.arange(0, HEAD_DIM)
    q_row = (seq.to(tl.int64) * KV_HEADS + head) * GQA + member
    q_place = tl.expand_dims(q_row, AXIS) * HEAD_DIM + tl.expand_dims(column, 1 - AXIS)
    query = tl.load(q + q_place, mask=tl.expand_dims(member < GQA, AXIS), other=0.0)
    base, offsets = tile_rows(table, block, start, head, context_len, KV_HEADS, BLOCK_SIZE, TILE)
    if TMA:
        # A tile that the context ends in is read from as many rows before its beginning as it
        # lacks tokens at its end. Those are outside the tensor: they cost no traffic and are 0.
        missing = tl.maximum(start + TILE - context_len, 0)
        valid = tl.arange(0, TILE) >= missing
        tile = (base // TILE).to(tl.int32)
        key = k_cache.load([tile, -missing, 0]).reshape(TILE, HEAD_DIM)
        value = v_cache.load([tile, -missing, 0]).reshape(TILE, HEAD_DIM)
    else:
        valid = start + tl.arange(0, TILE) < context_len
        place = offsets[:, None] * HEAD_DIM + column[None, :]
        cached = valid[:, None]
        keys, values = k_cache + base * HEAD_DIM, v_cache + base * HEAD_DIM
        key = tl.load(keys + place, mask=cached, other=0.0)
        value = tl.load(values + place, mask=cached, other=0.0)
    if AXIS == 0:
        score = tl.dot(key, query, input_precision="ieee")
    else:
        score = tl.dot(query, tl.trans(key), input_precision="ieee")
    score = tl.where(tl.expand_dims(valid, 1 - AXIS), score * scale_log2, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, axis=AXIS))
    prob = tl.exp2(score - tl.expand_dims(new_peak, AXIS))
    decay = tl.expand_dims(tl.exp2(peak - new_peak), AXIS)
    if AXIS == 0:
        acc = tl.dot(tl.trans(value), prob.to(value.dtype), acc * decay, input_precision="ieee")
    else:
        acc = tl.dot(prob.to(value.dtype), value, acc * decay, input_precision="ieee")
    return new_peak, weight * decay + prob, acc


@triton.jit
def _store_result(
    out, partial_out, partial_lse, group, is_whole, begins_here, peak, weight, acc,
    GQA: tl.constexpr, GQA_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Write a group's output, or this program's partial: to slot 1 if the group begins here."""
    member = tl.arange(0, GQA_PAD)
    column = tl.expand_dims(tl.arange(0, HEAD_DIM), 1 - AXIS)
    real = tl.expand_dims(member < GQA, AXIS)
    total = tl.sum(weight, axis=AXIS)
    acc = acc / tl.expand_dims(total, AXIS)
    if is_whole:
        q_row = group.to(tl.int64) * GQA + member
        out_place = out + tl.expand_dims(q_row, AXIS) * HEAD_DIM + column
        tl.store(out_place, acc.to(out.dtype.element_ty), mask=real)
    else:
        slot_row = (2 * tl.program_id(0) + begins_here.to(tl.int32)) * GQA + member
        place = partial_out + tl.expand_dims(slot_row, AXIS) * HEAD_DIM + column
        tl.store(place, acc, mask=real)
        tl.store(partial_lse + slot_row, peak + tl.log2(total), mask=member < GQA)
