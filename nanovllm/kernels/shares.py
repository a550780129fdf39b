"""Which KV tiles each program of the decode kernel takes: equal contiguous shares of all of them.

Tiles are numbered sequence by sequence and, within one, KV head by KV head. ``total`` of them are
divided among the programs of the grid; with fewer tiles than programs, the last shares are empty.
An item, which is the tiles of one (sequence, KV head) pair, may be cut by the borders of shares;
the last program to store its part joins them.
"""

import triton
import triton.language as tl


@triton.jit
def share_begin(share, total):
    """The first tile of a share; ``total`` for those beyond the last."""
    count = tl.maximum(tl.minimum(tl.num_programs(0), total), 1)
    # The first total % count shares have one tile more than the others.
    share = tl.minimum(share, count)
    return share * (total // count) + tl.minimum(share, total % count)


@triton.jit
def share_of(tile, total):
    """The share that holds a tile."""
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
    """The next tile: of this item, of the next KV head's, or of the next sequence's."""
    item_ends = (tile + 1) * TILE >= context_len
    tile = tl.where(item_ends, 0, tile + 1)
    head += item_ends.to(tl.int32)
    seq = tl.minimum(seq + (head == KV_HEADS).to(tl.int32), num_seqs - 1)
    return seq, tl.where(head == KV_HEADS, 0, head), tile


@triton.jit
def join_cut_items(
    out, partial_out, partial_lse, arrivals, total,
    first_item, first_begin, first_tiles, last_item, last_begin, last_tiles,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Announce this share's partials; join those of items of which no other is missing.

    At most two items of a share are cut, the first and the last one in it; they may be the same.
    """
    # Both are announced before either is joined, so that the second does not wait for the first.
    tl.debug_barrier()  # all partials are stored before one thread announces them
    first_complete = _announce(arrivals, total, first_begin, first_tiles, True)
    last_complete = _announce(arrivals, total, last_begin, last_tiles, last_begin != first_begin)
    if first_complete:
        _join_item(
            out, partial_out, partial_lse, arrivals, total, first_item, first_begin, first_tiles,
            GROUP, GROUP_PAD, HEAD_DIM, CHUNK,
        )  # fmt: skip
    if last_complete:
        _join_item(
            out, partial_out, partial_lse, arrivals, total, last_item, last_begin, last_tiles,
            GROUP, GROUP_PAD, HEAD_DIM, CHUNK,
        )  # fmt: skip


@triton.jit
def _announce(arrivals, total, item_begin, item_tiles, wanted):
    """Count this share's part of an item if it is cut; whether it was the last to arrive."""
    first = share_of(item_begin, total)
    last = share_of(item_begin + item_tiles - 1, total)
    is_cut = (first < last) & wanted
    arrived = tl.atomic_add(arrivals + first, 1, mask=is_cut, sem="acq_rel", scope="gpu")
    return is_cut & (arrived == last - first)


@triton.jit
def _join_item(
    out, partial_out, partial_lse, arrivals, total, item, item_begin, item_tiles,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    first = share_of(item_begin, total)
    last = share_of(item_begin + item_tiles - 1, total)
    tl.store(arrivals + first, 0)
    row = out + item.to(tl.int64) * GROUP * HEAD_DIM
    # Nearly all cut items lie in two shares, and no other work hides the time to join them: on an
    # H200 a chunk for 32 shares takes 3 us longer than one for 2.
    if last - first == 1:
        _join_partials(row, partial_out, partial_lse, first, last, GROUP, GROUP_PAD, HEAD_DIM, 2)
    else:
        _join_partials(
            row, partial_out, partial_lse, first, last, GROUP, GROUP_PAD, HEAD_DIM, CHUNK
        )


@triton.jit
def _join_partials(
    out, partial_out, partial_lse, first, last,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
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
