"""Top-k and top-p without sorting: the least logit of a row that may be drawn.

The logits that stay are those above a threshold, which is one logit of the row, and of those equal
to it the first few. A logit's *key* is an integer with the same order (its bits, rearranged), and
its *weight* what it adds to the sum of the softmax. The threshold is searched for among keys, by
how many logits, or how much weight, lie at and above some of them.

- ``_survey_kernel`` finds the maximum of every bucket of 256 logits and, for top-p alone, the least
  of all and the sum of all probabilities.
- ``_begin_kernel`` finds a *bound* from the maxima, below which the threshold cannot be: for top-k
  the k-th largest, for top-p the one at which the maxima alone add up to p.
- Where many buckets reach that bound, as most do if thousands of tokens stay, ``_narrow_kernel``
  divides the logits' range evenly, and again what is left of it. All SMs share a pass over a row.
  Then ``_list_kernel`` lists what is left, and ``_finish_kernel``, one program a row, searches it.
- ``_threshold_kernel``, one program a row, searches in all other rows, and reads no bucket whose
  maximum is below the bound.

Sums over a row are added up in the same order whatever the batch.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.logit_keys import (
    LOG2_E,
    all_keys,
    finite,
    key_of,
    load_logits,
    value_of,
    weight_of,
)
from nanovllm.kernels.reference_sampling import KEY_SHIFTS

TILE = 8192
BUCKET = 256
FEW = 256  # buckets that one program searches
SHORTLIST = 512  # logits of a tile that are listed, at most
_PASSES = 2
_PIVOTS = 8  # keys of a pass, between its ends
_CHUNK = 2048  # logits that a program lists at a time


def find_threshold(
    logits: Tensor, temperatures: Tensor, rows: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``reference_sampling.find_threshold``; rows may be strided, what is in them may not."""
    device, (num_rows, vocab), stride = logits.device, logits.shape, logits.stride(0)
    thresholds = torch.full((num_rows,), float("-inf"), dtype=torch.float32, device=device)
    tie_ends = torch.full((num_rows,), vocab, dtype=torch.int32, device=device)
    count, tiles = len(rows), triton.cdiv(vocab, TILE)
    buckets = tiles * (TILE // BUCKET)
    passes = 0 if top_p is None or buckets <= FEW else _PASSES
    # A limit that no row has is filled in: kernels without it would have to be compiled, too.
    top_k = torch.full_like(rows, vocab) if top_k is None else top_k
    top_p = temperatures.new_ones(count) if top_p is None else top_p

    floats = partial(torch.empty, dtype=torch.float32, device=device)
    integers = partial(torch.empty, dtype=torch.int32, device=device)
    # Of a row: its peak, all its weight, and whether it needs passes.
    facts = floats(count), floats(count), integers(count)
    # Of a pass: its keys (the ends, which the first and the last are, and the pivots), the weight
    # above them, and the weight of each tile from each pivot on.
    keys = integers(_PASSES, count, _PIVOTS + 2, dtype=torch.int64)
    search = keys, floats(_PASSES, count), floats(_PASSES, count, tiles, _PIVOTS)
    limits = temperatures, rows, top_k, top_p
    # Of a tile: its maximum, its least, and its weight.
    maxima, of_tiles = floats(count, buckets), floats(3, count, tiles)
    sizes = {
        "VOCAB": vocab, "SHIFT": KEY_SHIFTS.get(logits.dtype, 0), "PIVOTS": _PIVOTS,
        "TILES": tiles, "TILES_PAD": triton.next_power_of_2(tiles),
    }  # fmt: skip
    whole = {"BUCKETS": buckets, "BUCKETS_PAD": triton.next_power_of_2(buckets)}
    _survey_kernel[(count, tiles)](
        logits, *limits, maxima, of_tiles, stride, VOCAB=vocab, TILE=TILE, BUCKET=BUCKET,
        num_warps=8,
    )  # fmt: skip
    _begin_kernel[(count,)](
        *limits, maxima, of_tiles, *facts, *search[:2], **sizes, **whole, FEW=FEW, num_warps=4
    )
    for step in range(passes):
        _narrow_kernel[(count, tiles)](
            logits, temperatures, rows, top_p, *facts, *search, step, stride, **sizes, TILE=TILE,
            num_warps=4,
        )  # fmt: skip
    short = integers(count, tiles), integers(count, tiles, SHORTLIST if passes else 0)
    if passes:
        _list_kernel[(count, tiles)](
            logits, rows, top_p, *facts[1:], *search, *short, passes, stride, **sizes, TILE=TILE,
            CHUNK=min(_CHUNK, TILE), SHORTLIST=SHORTLIST, num_warps=4,
        )  # fmt: skip
        _finish_kernel[(count,)](
            logits, temperatures, rows, top_p, *facts, *search, *short, passes, thresholds,
            tie_ends, stride, **sizes, SHORTLIST=SHORTLIST, num_warps=32,
        )  # fmt: skip
    _threshold_kernel[(count,)](
        logits, *limits, *facts, *search, short[0], passes, maxima, integers(count, buckets),
        thresholds, tie_ends, stride, **sizes, **whole, BUCKET=BUCKET, SHORTLIST=SHORTLIST,
        num_warps=16,
    )  # fmt: skip
    return thresholds, tie_ends


# `item` is a filtered row, `row` its place among all rows. NaN counts as -inf. What varies with the
# batch, such as the alignment of its options, is not specialised: that would compile anew.


@triton.jit(do_not_specialize=["temperatures", "rows", "top_k", "top_p"])
def _survey_kernel(
    logits, temperatures, rows, top_k, top_p, maxima, of_tiles, stride,
    VOCAB: tl.constexpr, TILE: tl.constexpr, BUCKET: tl.constexpr,
):  # fmt: skip
    """The maximum of every bucket of a tile; of the tile also the least and the weight."""
    item, tile = tl.program_id(0), tl.program_id(1)
    items, tiles = tl.num_programs(0), tl.num_programs(1)
    row = tl.load(rows + item)
    bucket = tile * (TILE // BUCKET) + tl.arange(0, TILE // BUCKET)
    token = bucket[:, None] * BUCKET + tl.arange(0, BUCKET)[None, :]
    value = load_logits(logits + row * stride, token, VOCAB)
    maximum = tl.max(value, axis=1)
    tl.store(maxima + item * tiles * (TILE // BUCKET) + bucket, maximum)
    if (tl.load(top_k + item) >= VOCAB) & (tl.load(top_p + item) < 1):
        highest = tl.max(maximum, axis=0)
        least = tl.where(token < VOCAB, value, float("inf"))
        weight = weight_of(value, finite(highest), LOG2_E / tl.load(temperatures + row))
        at = of_tiles + item * tiles + tile
        tl.store(at, highest)
        tl.store(at + items * tiles, tl.min(tl.min(least, axis=1), axis=0))
        tl.store(at + 2 * items * tiles, tl.sum(tl.sum(weight, axis=1), axis=0))


@triton.jit(do_not_specialize=["temperatures", "rows", "top_k", "top_p"])
def _begin_kernel(
    temperatures, rows, top_k, top_p, maxima, of_tiles, peaks, totals, wide, keys, above,
    VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, BUCKETS: tl.constexpr, BUCKETS_PAD: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """The ends of a row's search, and whether it needs passes."""
    item, items = tl.program_id(0), tl.num_programs(0)
    k, p = tl.load(top_k + item), tl.load(top_p + item)
    scale = LOG2_E / tl.load(temperatures + tl.load(rows + item))
    maximum = _maxima(maxima, item, BUCKETS, BUCKETS_PAD)
    highest = tl.max(maximum, axis=0)
    peak = finite(highest)
    bottom, top = all_keys(highest, SHIFT)
    total = tl.zeros([], tl.float32)
    is_wide = tl.full([], 0, tl.int32)
    if k < VOCAB:
        one = tl.full([BUCKETS_PAD], 1.0, tl.float32)
        bottom = _reach(maximum, one, k.to(tl.float32), bottom, top, SHIFT)
    elif p < 1:
        tile = tl.arange(0, TILES_PAD)
        at, there = of_tiles + item * TILES + tile, tile < TILES
        tile_peak = tl.load(at, mask=there, other=float("-inf"))
        least = tl.load(at + items * TILES, mask=there, other=float("inf"))
        weight = tl.load(at + 2 * items * TILES, mask=there, other=0.0)
        total = tl.sum(weight * weight_of(tile_peak, peak, scale), axis=0)
        weight = weight_of(maximum, peak, scale)
        bottom = _reach(maximum, weight, p * total, bottom, top, SHIFT)
        few = tl.sum((maximum >= value_of(bottom, SHIFT)).to(tl.int32), axis=0) <= FEW
        if not few:
            is_wide = tl.full([], 1, tl.int32)
            # All logits that are further below the peak weigh less than 1 - p of the whole row.
            reach = tl.log2(VOCAB / (1 - p)) / scale
            lowest = tl.maximum(finite(tl.min(least, axis=0)), peak - reach)
            bottom = tl.minimum(tl.maximum(key_of(finite(lowest), SHIFT), bottom), top)
    tl.store(peaks + item, peak)
    tl.store(totals + item, total)
    tl.store(wide + item, is_wide)
    tl.store(keys + item * (PIVOTS + 2), bottom)
    tl.store(keys + item * (PIVOTS + 2) + PIVOTS + 1, top)
    tl.store(above + item, 0.0)


@triton.jit(do_not_specialize=["temperatures", "rows", "top_p", "step"])
def _narrow_kernel(
    logits, temperatures, rows, top_p, peaks, totals, wide, keys, above, sums, step, stride,
    VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile's part of a pass: the weight from each pivot on."""
    item, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(wide + item) == 0:
        return
    target = tl.load(top_p + item) * tl.load(totals + item)
    bottom, top, weight_above = _range(
        keys, above, sums, step, item, target, PIVOTS, TILES, TILES_PAD
    )
    place = step * tl.num_programs(0) + item
    keys += place * (PIVOTS + 2)
    if (tile == 0) & (step > 0):
        tl.store(keys, bottom)
        tl.store(keys + PIVOTS + 1, top)
        tl.store(above + place, weight_above)
    row, peak = tl.load(rows + item), tl.load(peaks + item)
    value = load_logits(logits + row * stride, tile * TILE + tl.arange(0, TILE), VOCAB)
    weight = weight_of(value, peak, LOG2_E / tl.load(temperatures + row))
    lowest, highest = value_of(bottom, SHIFT), finite(value_of(top, SHIFT))
    for pivot in tl.static_range(PIVOTS):
        near = lowest + (highest - lowest) * ((pivot + 1) / (PIVOTS + 1))
        key = tl.minimum(tl.maximum(key_of(finite(near), SHIFT), bottom), top)
        if tile == 0:
            tl.store(keys + pivot + 1, key)
        # A factor, not a choice: a product and its sum are one instruction.
        reached = (value >= value_of(key, SHIFT)).to(tl.float32)
        part = tl.sum(reached * weight, axis=0)
        tl.store(sums + (place * TILES + tile) * PIVOTS + pivot, part)


@triton.jit(do_not_specialize=["rows", "top_p", "step"])
def _list_kernel(
    logits, rows, top_p, totals, wide, keys, above, sums, numbers, tokens, step, stride,
    VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, SHORTLIST: tl.constexpr,
):  # fmt: skip
    """The first SHORTLIST tokens of a tile between a search's ends; `numbers`: how many it has."""
    item, tile = tl.program_id(0), tl.program_id(1)
    if tl.load(wide + item) == 0:
        return
    target = tl.load(top_p + item) * tl.load(totals + item)
    bottom, top, _ = _range(keys, above, sums, step, item, target, PIVOTS, TILES, TILES_PAD)
    source = logits + tl.load(rows + item) * stride
    at = (item * TILES + tile) * SHORTLIST
    number = tl.zeros([], tl.int32)
    for start in range(0, TILE, CHUNK):
        token = tile * TILE + start + tl.arange(0, CHUNK)
        value = load_logits(source, token, VOCAB)
        # NOTE: not `<`, for the key behind infinity is that of NaN.
        left = ((value >= value_of(bottom, SHIFT)) & ~(value >= value_of(top, SHIFT))).to(tl.int32)
        place = number + tl.cumsum(left, axis=0) - 1
        wanted = (left > 0) & (place < SHORTLIST)
        tl.store(tokens + at + place, token, mask=wanted)
        number += tl.sum(left, axis=0)
    tl.store(numbers + item * TILES + tile, number)


@triton.jit(do_not_specialize=["temperatures", "rows", "top_p", "step"])
def _finish_kernel(
    logits, temperatures, rows, top_p, peaks, totals, wide, keys, above, sums, numbers, tokens,
    step, thresholds, tie_ends, stride,
    VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, SHORTLIST: tl.constexpr,
):  # fmt: skip
    """The threshold of a row whose logits around it are listed."""
    item = tl.program_id(0)
    if tl.load(wide + item) == 0:
        return
    if not _is_short(numbers, item, TILES, TILES_PAD, SHORTLIST):
        return
    row, peak = tl.load(rows + item), tl.load(peaks + item)
    scale = LOG2_E / tl.load(temperatures + row)
    target = tl.load(top_p + item) * tl.load(totals + item)
    bottom, top, beyond = _range(keys, above, sums, step, item, target, PIVOTS, TILES, TILES_PAD)
    tile, place = tl.arange(0, TILES_PAD)[:, None], tl.arange(0, SHORTLIST)[None, :]
    number = tl.load(numbers + item * TILES + tile, mask=tile < TILES, other=0)
    there = place < number
    at = tokens + (item * TILES + tile) * SHORTLIST + place
    token = tl.load(at, mask=there, other=VOCAB)
    value = load_logits(logits + row * stride, token, VOCAB)
    weight = tl.where(there, weight_of(value, peak, scale), 0.0)
    weight_above = beyond
    while top - bottom > 1:
        half = bottom + (top - bottom) // 2
        more = tl.where(value >= value_of(half, SHIFT), weight, 0.0)
        reached = beyond + tl.sum(tl.sum(more, axis=1), axis=0)
        enough = reached >= target
        bottom, top = tl.where(enough, half, bottom), tl.where(enough, top, half)
        weight_above = tl.where(enough, weight_above, reached)
    threshold = value_of(bottom, SHIFT)
    stay = _ties(target - weight_above, weight_of(threshold, peak, scale), VOCAB)
    ties = tl.reshape((there & (value == threshold)).to(tl.int32), [TILES_PAD * SHORTLIST])
    rank = tl.cumsum(ties, axis=0)
    token = tl.reshape(token, [TILES_PAD * SHORTLIST])
    end = tl.where((ties > 0) & (rank >= stay), token, VOCAB)
    tl.store(thresholds + row, threshold)
    tl.store(tie_ends + row, tl.min(end, axis=0))


@triton.jit(do_not_specialize=["temperatures", "rows", "top_k", "top_p", "step"])
def _threshold_kernel(
    logits, temperatures, rows, top_k, top_p, peaks, totals, wide, keys, above, sums,
    numbers, step, maxima, listed, thresholds, tie_ends, stride,
    VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, BUCKETS: tl.constexpr, BUCKETS_PAD: tl.constexpr, BUCKET: tl.constexpr,
    SHORTLIST: tl.constexpr,
):  # fmt: skip
    """The threshold of any other row."""
    item = tl.program_id(0)
    k, p = tl.load(top_k + item), tl.load(top_p + item)
    if (k >= VOCAB) & (p >= 1):
        return
    is_wide = tl.load(wide + item) > 0
    if is_wide & _is_short(numbers, item, TILES, TILES_PAD, SHORTLIST):
        return
    row, peak = tl.load(rows + item), tl.load(peaks + item)
    source = logits + row * stride
    scale = LOG2_E / tl.load(temperatures + row)
    target = p * tl.load(totals + item)
    done = tl.where(is_wide, step, 0)
    bottom, top, weight_above = _range(
        keys, above, sums, done, item, target, PIVOTS, TILES, TILES_PAD
    )

    # List the buckets that may hold a logit that stays.
    maximum = _maxima(maxima, item, BUCKETS, BUCKETS_PAD)
    listed += item * BUCKETS
    wanted = (maximum >= value_of(bottom, SHIFT)).to(tl.int32)
    tl.store(listed + tl.cumsum(wanted, axis=0) - 1, tl.arange(0, BUCKETS_PAD), mask=wanted > 0)
    count = tl.sum(wanted, axis=0)
    tl.debug_barrier()  # all of the list is stored before any thread reads it

    stay = tl.full([], VOCAB, tl.int32)  # how many of the logits equal to the threshold
    least = bottom
    if k < VOCAB:
        bottom, weight_above = _search(
            source, listed, count, k.to(tl.float32), bottom, top, weight_above, peak, 0.0,
            VOCAB, BUCKET, SHIFT,
        )  # fmt: skip
        stay = _ties(k - weight_above, 1.0, VOCAB)
        least = bottom
        # NOTE: a plain 0.0 is a constant, and its type would change within a loop.
        weight_above = tl.zeros([], tl.float32)
        if p < 1:
            more = _weight_from(source, listed, count, least + 1, peak, scale, VOCAB, BUCKET, SHIFT)
            target = p * (more + stay * weight_of(value_of(least, SHIFT), peak, scale))
    if p < 1:
        bottom, weight_above = _search(
            source, listed, count, target, bottom, top, weight_above, peak, scale,
            VOCAB, BUCKET, SHIFT,
        )  # fmt: skip
        needed = _ties(
            target - weight_above, weight_of(value_of(bottom, SHIFT), peak, scale), VOCAB
        )
        stay = tl.where(bottom == least, tl.minimum(needed, stay), needed)
    threshold = value_of(bottom, SHIFT)
    tl.store(thresholds + row, threshold)
    tie_end = _tie_end(source, listed, count, threshold, stay, VOCAB, BUCKET)
    tl.store(tie_ends + row, tie_end)


# ------------------------------------------------------------------ searches


@triton.jit
def _range(
    keys, above, sums, step, item, target,
    PIVOTS: tl.constexpr, TILES: tl.constexpr, TILES_PAD: tl.constexpr,
):  # fmt: skip
    """Before pass `step`: the key searched for is one from `bottom` to `top` - 1.

    Also the weight from `top` on.
    """
    place = tl.maximum(step - 1, 0) * tl.num_programs(0) + item
    keys += place * (PIVOTS + 2)
    bottom, top = tl.load(keys), tl.load(keys + PIVOTS + 1)
    weight_above = tl.load(above + place)
    if step > 0:
        tile, pivot = tl.arange(0, TILES_PAD), tl.arange(0, PIVOTS)
        part = sums + (place * TILES + tile[:, None]) * PIVOTS + pivot[None, :]
        weight = tl.sum(tl.load(part, mask=tile[:, None] < TILES, other=0.0), axis=0)
        key = tl.load(keys + 1 + pivot)
        enough = weight >= target
        weight_above = tl.max(tl.where(enough, weight_above, weight), axis=0)
        bottom = tl.max(tl.where(enough, key, bottom), axis=0)
        top = tl.min(tl.where(enough, top, key), axis=0)
    return bottom, top, weight_above


@triton.jit
def _is_short(numbers, item, TILES: tl.constexpr, TILES_PAD: tl.constexpr, SHORTLIST: tl.constexpr):
    """Whether all of what is left of a row is listed."""
    tile = tl.arange(0, TILES_PAD)
    number = tl.load(numbers + item * TILES + tile, mask=tile < TILES, other=0)
    return tl.max(number, axis=0) <= SHORTLIST


@triton.jit
def _ties(missing, weight, VOCAB: tl.constexpr):
    """How many logits of some weight make up for what is missing."""
    needed = tl.ceil(missing / tl.maximum(weight, 1e-37))
    return tl.minimum(tl.maximum(needed, 1.0), VOCAB).to(tl.int32)


@triton.jit
def _search(
    source, listed, count, limit, bottom, top, weight_above, peak, scale,
    VOCAB: tl.constexpr, BUCKET: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The largest key from which on listed logits weigh `limit`, and the weight above it.

    `weight_above` is the weight from `top` on.
    """
    while top - bottom > 1:
        half = bottom + (top - bottom) // 2
        weight = _weight_from(source, listed, count, half, peak, scale, VOCAB, BUCKET, SHIFT)
        enough = weight >= limit
        bottom = tl.where(enough, half, bottom)
        top = tl.where(enough, top, half)
        weight_above = tl.where(enough, weight_above, weight)
    return bottom, weight_above


@triton.jit
def _weight_from(
    source, listed, count, key, peak, scale,
    VOCAB: tl.constexpr, BUCKET: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """What the listed logits from a key on weigh; their number for a scale of 0."""
    total = tl.zeros([], tl.float32)
    for first in range(0, count, 32):
        value, _ = _load_listed(source, listed, first, count, 32, VOCAB, BUCKET)
        reached = value >= value_of(key, SHIFT)
        total += tl.sum(tl.where(reached, weight_of(value, peak, scale), 0.0))
    return total


@triton.jit
def _reach(maximum, weight, target, bottom, top, SHIFT: tl.constexpr):
    """The largest key below `top` from which on these weigh `target`, or `bottom`."""
    for _ in range(32 - SHIFT):
        half = bottom + (top - bottom) // 2
        enough = tl.sum(tl.where(maximum >= value_of(half, SHIFT), weight, 0.0), axis=0) >= target
        bottom = tl.where(enough, half, bottom)
        top = tl.where(enough, top, half)
    return bottom


@triton.jit
def _tie_end(source, listed, count, threshold, stay, VOCAB: tl.constexpr, BUCKET: tl.constexpr):
    """The token of the `stay`-th listed logit that equals the threshold, or VOCAB."""
    place = tl.full([], -1, tl.int32)  # in the list, of the buckets that hold it
    left = stay
    for first in range(0, count, 64):
        value, _ = _load_listed(source, listed, first, count, 64, VOCAB, BUCKET)
        ties = tl.sum((value == threshold).to(tl.int32))
        place = tl.where((place < 0) & (ties >= left), first, place)
        left -= tl.where(place < 0, ties, 0)
    end = tl.full([], VOCAB, tl.int32)
    if place >= 0:
        value, token = _load_listed(source, listed, place, count, 64, VOCAB, BUCKET)
        rank = tl.cumsum(tl.reshape((value == threshold).to(tl.int32), [64 * BUCKET]), axis=0)
        end = tl.min(tl.where(rank >= left, tl.reshape(token, [64 * BUCKET]), VOCAB), axis=0)
    return end


# ------------------------------------------------------------------ buckets


@triton.jit
def _load_listed(
    source, listed, first, count, COUNT: tl.constexpr, VOCAB: tl.constexpr, BUCKET: tl.constexpr
):
    """Logits and tokens ``[COUNT, BUCKET]`` of the listed buckets from the first-th on."""
    place = first + tl.arange(0, COUNT)
    bucket = tl.load(listed + place, mask=place < count, other=VOCAB)
    token = bucket[:, None] * BUCKET + tl.arange(0, BUCKET)[None, :]
    return load_logits(source, token, VOCAB), token


@triton.jit
def _maxima(maxima, item, BUCKETS: tl.constexpr, BUCKETS_PAD: tl.constexpr):
    bucket = tl.arange(0, BUCKETS_PAD)
    return tl.load(maxima + item * BUCKETS + bucket, mask=bucket < BUCKETS, other=float("-inf"))
