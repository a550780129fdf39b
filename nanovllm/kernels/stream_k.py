"""Which KV tiles each program of the decode kernel takes: equal contiguous ranges of all of them.

Tiles are numbered sequence by sequence and, within one, KV head by KV head. ``total`` of them are
divided among the programs of the grid; with fewer tiles than programs, the last ranges are empty.
A tile group, which is the tiles of one (sequence, KV head) pair, may be split by the borders of
ranges. The last program to store its partial result combines them.
"""

import triton
import triton.language as tl


@triton.jit
def range_begin(program, total):
    """The first tile of a program's range; ``total`` for those beyond the last."""
    count = tl.maximum(tl.minimum(tl.num_programs(0), total), 1)
    # The first total % count ranges have one tile more than the others.
    program = tl.minimum(program, count)
    return program * (total // count) + tl.minimum(program, total % count)


@triton.jit
def program_of(tile, total):
    """The program whose range holds a tile."""
    count = tl.minimum(tl.num_programs(0), total)
    size, larger = total // count, total % count
    return tl.where(
        tile < larger * (size + 1),
        tile // (size + 1),
        larger + (tile - larger * (size + 1)) // size,
    )


@triton.jit
def find_sequence(tile_offsets, num_seqs, tile, CHUNK: tl.constexpr = 512):
    """The sequence that holds a tile: the last one with ``tile_offsets[seq] <= tile``."""
    begun = tl.zeros([], tl.int32)
    for chunk in range(0, num_seqs, CHUNK):
        seq = chunk + tl.arange(0, CHUNK)
        offset = tl.load(tile_offsets + seq, mask=seq < num_seqs, other=2**31 - 1)
        begun += tl.sum((offset <= tile).to(tl.int32), axis=0)
    return begun - 1


@triton.jit
def tile_after(seq, head, tile, context_len, num_seqs, KV_HEADS: tl.constexpr, TILE: tl.constexpr):
    """The next tile: of this group, of the next KV head's, or of the next sequence's."""
    group_ends = (tile + 1) * TILE >= context_len
    tile = tl.where(group_ends, 0, tile + 1)
    head += group_ends.to(tl.int32)
    seq = tl.minimum(seq + (head == KV_HEADS).to(tl.int32), num_seqs - 1)
    return seq, tl.where(head == KV_HEADS, 0, head), tile


@triton.jit
def combine_partials(
    out, partial_out, partial_lse, arrivals, total,
    first_group, first_begin, first_tiles, last_group, last_begin, last_tiles,
    GQA: tl.constexpr, GQA_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Announce this program's partials; combine those of groups of which no other is missing.

    At most two groups of a range are split, the first and the last in it; they may be the same.
    """
    # Both are announced before either is combined: the second does not wait for the first.
    tl.debug_barrier()  # all partials are stored before one thread announces them
    first_complete = _announce(arrivals, total, first_begin, first_tiles, True)
    last_complete = _announce(arrivals, total, last_begin, last_tiles, last_begin != first_begin)
    if first_complete:
        _combine_group(
            out, partial_out, partial_lse, arrivals, total, first_group, first_begin, first_tiles,
            GQA, GQA_PAD, HEAD_DIM, CHUNK,
        )  # fmt: skip
    if last_complete:
        _combine_group(
            out, partial_out, partial_lse, arrivals, total, last_group, last_begin, last_tiles,
            GQA, GQA_PAD, HEAD_DIM, CHUNK,
        )  # fmt: skip


@triton.jit
def _announce(arrivals, total, group_begin, group_tiles, wanted):
    """Count this program's partial of a split group; returns whether all have arrived now."""
    first = program_of(group_begin, total)
    last = program_of(group_begin + group_tiles - 1, total)
    is_split = (first < last) & wanted
    arrived = tl.atomic_add(arrivals + first, 1, mask=is_split, sem="acq_rel", scope="gpu")
    return is_split & (arrived == last - first)


@triton.jit
def _combine_group(
    out, partial_out, partial_lse, arrivals, total, group, group_begin, group_tiles,
    GQA: tl.constexpr, GQA_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    first = program_of(group_begin, total)
    last = program_of(group_begin + group_tiles - 1, total)
    tl.store(arrivals + first, 0)
    row = out + group.to(tl.int64) * GQA * HEAD_DIM
    # Nearly all split groups lie in two ranges, and the time to combine them grows with the chunk.
    if last - first == 1:
        _average(row, partial_out, partial_lse, first, last, GQA, GQA_PAD, HEAD_DIM, 2)
    else:
        _average(row, partial_out, partial_lse, first, last, GQA, GQA_PAD, HEAD_DIM, CHUNK)


@triton.jit
def _average(
    out, partial_out, partial_lse, first, last,
    GQA: tl.constexpr, GQA_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Average the partials of programs first..last into a group's rows ``out [GQA, D]``."""
    member = tl.arange(0, GQA_PAD)
    column = tl.arange(0, HEAD_DIM)
    real = member < GQA
    peak = tl.full([GQA_PAD], -3.0e38, tl.float32)
    weight = tl.zeros([GQA_PAD], tl.float32)
    acc = tl.zeros([GQA_PAD, HEAD_DIM], tl.float32)
    for chunk in range(first, last + 1, CHUNK):
        program = chunk + tl.arange(0, CHUNK)
        row = (2 * program + (program == first).to(tl.int32))[:, None] * GQA + member[None, :]
        wrote = (program <= last)[:, None] & real[None, :]
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
