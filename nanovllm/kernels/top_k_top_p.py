"""Top-k and top-p without sorting: the least logit of a row that may be drawn.

The logits that stay are those above a threshold, which is one logit of the row, and of those equal
to it the first few. Bits of a float, put in order, are an integer key, so the threshold is searched
for among keys, by how much (tokens, or probability) lies at and above some of them.

- ``_survey_kernel`` finds the maximum of every bucket of 256 logits. Only buckets whose maximum is
  among the k largest can hold one of the k. The search for top-k, and for top-p of what it has
  left, reads nothing else.
- ``_narrow_kernel`` serves rows with top-p alone, which may need most of the vocabulary. All SMs
  share a pass over a row. The first divides the logits near the peak evenly, the second what is
  left of these, and each other one leaves an eighth of the keys.
- ``_shortlist_kernel`` lists what the first two passes have left, where that is little, as it is
  unless the logits are nearly equal. ``_finish_kernel``, one program a row, searches there, and the
  other passes have nothing to do.
- ``_threshold_kernel``, one program a row, does the rest.

Sums over a row are added up in the same order whatever the batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.reference_sampling import KEY_SHIFTS

TILE = 8192
BUCKET = 256
_PIVOTS = 8  # keys of a pass
_EVEN = tl.constexpr(2)  # passes that divide logits and not keys, before some are listed
SHORTLIST = 512  # logits of a tile, at most
_LOG2_E = tl.constexpr(1.4426950408889634)
_MAX = tl.constexpr(3.4028234663852886e38)


def find_threshold(
    logits: Tensor, temperatures: Tensor, rows: Tensor, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See ``reference_sampling.find_threshold``; rows may be strided, what is in them may not."""
    device, (num_rows, vocab), stride = logits.device, logits.shape, logits.stride(0)
    thresholds = torch.full((num_rows,), float("-inf"), dtype=torch.float32, device=device)
    tie_ends = torch.full((num_rows,), vocab, dtype=torch.int32, device=device)
    count = len(rows)
    tiles = triton.cdiv(vocab, TILE)
    buckets = tiles * (TILE // BUCKET)
    shift = KEY_SHIFTS.get(logits.dtype, 0)
    maxima = torch.empty(count, buckets, dtype=torch.float32, device=device)
    _survey_kernel[(count, tiles)](
        logits, rows, maxima, stride, VOCAB=vocab, TILE=TILE, BUCKET=BUCKET, num_warps=8
    )
    # So many passes leave one of 2^(32 - shift) keys, or nearly (what is left, `_search` finds).
    passes = 0 if top_p is None else triton.cdiv(32 - shift, _PIVOTS.bit_length() - 1)
    # A limit that no row has is filled in: kernels without it would have to be compiled, too.
    top_k = torch.full_like(rows, vocab) if top_k is None else top_k
    top_p = temperatures.new_ones(count) if top_p is None else top_p
    row_inputs = (logits, temperatures, rows, top_k, top_p, maxima)
    sizes = {
        "VOCAB": vocab, "SHIFT": shift, "PIVOTS": _PIVOTS,
        "TILES": tiles, "TILES_PAD": triton.next_power_of_2(tiles),
        "BUCKETS": buckets, "BUCKETS_PAD": triton.next_power_of_2(buckets),
    }  # fmt: skip
    peaks = torch.empty(count, dtype=torch.float32, device=device)
    # Keys of a pass: its pivots, the first is the least searched, and the end of its range.
    keys = torch.empty(passes, count, _PIVOTS + 1, dtype=torch.int64, device=device)
    above = torch.empty(passes, count, dtype=torch.float32, device=device)
    sums = torch.empty(passes, count, tiles, _PIVOTS, dtype=torch.float32, device=device)
    numbers = torch.zeros(count, tiles, dtype=torch.int32, device=device)
    places = (count, tiles, SHORTLIST) if passes else 0
    values = torch.empty(places, dtype=logits.dtype, device=device)
    tokens = torch.empty(places, dtype=torch.int32, device=device)
    short, state = (numbers, values, tokens), (peaks, keys, above, sums)
    sizes["SHORTLIST"] = SHORTLIST
    for step in range(passes):
        if step == _EVEN.value:
            _shortlist_kernel[(count, tiles)](
                *row_inputs, *state, *short, stride, TILE=TILE, **sizes, num_warps=4
            )
            _finish_kernel[(count,)](
                *row_inputs, *state, *short, thresholds, tie_ends, **sizes, num_warps=32
            )
        _narrow_kernel[(count, tiles)](
            *row_inputs, *state, numbers, step, stride, TILE=TILE, **sizes, num_warps=4
        )
    listed = torch.empty(count, buckets, dtype=torch.int32, device=device)
    _threshold_kernel[(count,)](
        *row_inputs, keys, above, sums, numbers, passes, listed, thresholds, tie_ends, stride,
        BUCKET=BUCKET, **sizes, num_warps=16,
    )  # fmt: skip
    return thresholds, tie_ends


# `item` is a filtered row, `row` its place among all rows. NaN counts as -inf. What varies with the
# batch, such as the alignment of its options, is not specialised: that would compile anew.


@triton.jit(do_not_specialize=["rows"])
def _survey_kernel(
    logits, rows, maxima, stride, VOCAB: tl.constexpr, TILE: tl.constexpr, BUCKET: tl.constexpr
):
    """The maximum of every bucket of a tile."""
    item, tile = tl.program_id(0), tl.program_id(1)
    bucket = tile * (TILE // BUCKET) + tl.arange(0, TILE // BUCKET)
    token = bucket[:, None] * BUCKET + tl.arange(0, BUCKET)[None, :]
    value = _load(logits + tl.load(rows + item) * stride, token, VOCAB)
    buckets = tl.num_programs(1) * (TILE // BUCKET)
    tl.store(maxima + item * buckets + bucket, tl.max(value, axis=1))


@triton.jit(do_not_specialize=["temperatures", "rows", "top_k", "top_p", "step"])
def _narrow_kernel(
    logits, temperatures, rows, top_k, top_p, maxima, peaks, keys, above, sums, numbers, step,
    stride, VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, BUCKETS: tl.constexpr, BUCKETS_PAD: tl.constexpr, TILE: tl.constexpr,
    SHORTLIST: tl.constexpr,
):  # fmt: skip
    """A tile's part of a pass: the probability, but for a factor, from each pivot on."""
    item, tile = tl.program_id(0), tl.program_id(1)
    limit = tl.where(tl.load(top_k + item) < VOCAB, 1.0, tl.load(top_p + item))
    if limit >= 1:
        return
    if step >= _EVEN and _is_short(numbers, item, TILES, TILES_PAD, SHORTLIST):
        return
    if step == 0:
        highest = tl.max(_maxima(maxima, item, BUCKETS, BUCKETS_PAD), axis=0)
    else:
        highest = tl.load(peaks + item)
    bottom, top, weight_above, _ = _range(
        keys, above, sums, step, item, highest, limit, PIVOTS, TILES, TILES_PAD, SHIFT
    )
    place = step * tl.num_programs(0) + item
    keys += place * (PIVOTS + 1)
    if tile == 0:
        tl.store(peaks + item, highest)
        tl.store(above + place, weight_above)
        tl.store(keys, bottom)
        tl.store(keys + PIVOTS, top)
    if (step > 0) & (top - bottom <= 1):
        return  # the key is found
    row = tl.load(rows + item)
    value = _load(logits + row * stride, tile * TILE + tl.arange(0, TILE), VOCAB)
    scale = _LOG2_E / tl.load(temperatures + row)
    weight = _weight(value, _finite(highest), scale)
    # All logits that are further below the peak weigh less than 1 - limit of the whole row.
    reach = tl.log2(VOCAB / (1 - limit)) / scale
    for pivot in tl.static_range(PIVOTS):
        key = bottom + (top - bottom) * pivot // PIVOTS
        if (step < _EVEN) & (pivot > 0):
            near = _finite(highest) - reach * ((PIVOTS - pivot) / (PIVOTS - 1))
            if step > 0:
                lowest = _value(bottom, SHIFT)
                near = lowest + (_finite(_value(top, SHIFT)) - lowest) * (pivot / PIVOTS)
            key = tl.minimum(tl.maximum(_key(_finite(near), SHIFT), bottom), top)
        if tile == 0:
            tl.store(keys + pivot, key)
        # A factor, not a choice: a product and its sum are one instruction.
        reached = (value >= _value(key, SHIFT)).to(tl.float32)
        part = tl.sum(reached * weight, axis=0)
        tl.store(sums + (place * TILES + tile) * PIVOTS + pivot, part)


@triton.jit(do_not_specialize=["temperatures", "rows", "top_k", "top_p"])
def _shortlist_kernel(
    logits, temperatures, rows, top_k, top_p, maxima, peaks, keys, above, sums,
    numbers, values, tokens, stride,
    VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, BUCKETS: tl.constexpr, BUCKETS_PAD: tl.constexpr, TILE: tl.constexpr,
    SHORTLIST: tl.constexpr,
):  # fmt: skip
    """A tile's logits among which the threshold is, if they are few; `numbers`: how many."""
    item, tile = tl.program_id(0), tl.program_id(1)
    p = tl.load(top_p + item)
    if (tl.load(top_k + item) < VOCAB) | (p >= 1):
        return
    bottom, top, _, _ = _range(
        keys, above, sums, _EVEN, item, tl.load(peaks + item), p, PIVOTS, TILES, TILES_PAD, SHIFT
    )
    token = tile * TILE + tl.arange(0, TILE)
    value = _load(logits + tl.load(rows + item) * stride, token, VOCAB)
    # NOTE: not `<`, for the key behind infinity is that of NaN.
    left = ((value >= _value(bottom, SHIFT)) & ~(value >= _value(top, SHIFT))).to(tl.int32)
    place = tl.cumsum(left, axis=0) - 1
    wanted = (left > 0) & (place < SHORTLIST)
    at = item * TILES + tile
    tl.store(values + at * SHORTLIST + place, value.to(values.dtype.element_ty), mask=wanted)
    tl.store(tokens + at * SHORTLIST + place, token, mask=wanted)
    tl.store(numbers + at, tl.sum(left, axis=0))


@triton.jit(do_not_specialize=["temperatures", "rows", "top_k", "top_p"])
def _finish_kernel(
    logits, temperatures, rows, top_k, top_p, maxima, peaks, keys, above, sums,
    numbers, values, tokens, thresholds, tie_ends,
    VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, BUCKETS: tl.constexpr, BUCKETS_PAD: tl.constexpr,
    SHORTLIST: tl.constexpr,
):  # fmt: skip
    """The threshold of a row whose logits around it are listed."""
    item = tl.program_id(0)
    p = tl.load(top_p + item)
    if (tl.load(top_k + item) < VOCAB) | (p >= 1):
        return
    if _is_short(numbers, item, TILES, TILES_PAD, SHORTLIST):
        highest = tl.load(peaks + item)
        row, peak = tl.load(rows + item), _finite(highest)
        scale = _LOG2_E / tl.load(temperatures + row)
        bottom, top, beyond, total = _range(
            keys, above, sums, _EVEN, item, highest, p, PIVOTS, TILES, TILES_PAD, SHIFT
        )
        tile, place = tl.arange(0, TILES_PAD)[:, None], tl.arange(0, SHORTLIST)[None, :]
        number = tl.load(numbers + item * TILES + tile, mask=tile < TILES, other=0)
        there = place < number
        at = (item * TILES + tile) * SHORTLIST + place
        value = tl.load(values + at, mask=there, other=float("-inf")).to(tl.float32)
        weight = tl.where(there, _weight(value, peak, scale), 0.0)
        weight_above = beyond
        while top - bottom > 1:
            half = bottom + (top - bottom) // 2
            more = tl.where(value >= _value(half, SHIFT), weight, 0.0)
            reached = beyond + tl.sum(tl.sum(more, axis=1), axis=0)
            enough = reached >= p * total
            bottom, top = tl.where(enough, half, bottom), tl.where(enough, top, half)
            weight_above = tl.where(enough, weight_above, reached)
        threshold = _value(bottom, SHIFT)
        one = tl.maximum(_weight(threshold, peak, scale), 1e-37)
        stay = tl.ceil((p * total - weight_above) / one)
        stay = tl.minimum(tl.maximum(stay, 1.0), VOCAB).to(tl.int32)
        token = tl.load(tokens + at, mask=there, other=VOCAB)
        ties = tl.reshape((there & (value == threshold)).to(tl.int32), [TILES_PAD * SHORTLIST])
        rank = tl.cumsum(ties, axis=0)
        end = tl.where(
            (ties > 0) & (rank >= stay), tl.reshape(token, [TILES_PAD * SHORTLIST]), VOCAB
        )
        tl.store(thresholds + row, threshold)
        tl.store(tie_ends + row, tl.min(end, axis=0))


@triton.jit
def _is_short(numbers, item, TILES: tl.constexpr, TILES_PAD: tl.constexpr, SHORTLIST: tl.constexpr):
    tile = tl.arange(0, TILES_PAD)
    number = tl.load(numbers + item * TILES + tile, mask=tile < TILES, other=0)
    return tl.max(number, axis=0) <= SHORTLIST


@triton.jit(do_not_specialize=["temperatures", "rows", "top_k", "top_p", "passes"])
def _threshold_kernel(
    logits, temperatures, rows, top_k, top_p, maxima, keys, above, sums, numbers, passes,
    listed, thresholds, tie_ends, stride,
    VOCAB: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr, TILES: tl.constexpr,
    TILES_PAD: tl.constexpr, BUCKETS: tl.constexpr, BUCKETS_PAD: tl.constexpr, BUCKET: tl.constexpr,
    SHORTLIST: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    k, p = tl.load(top_k + item), tl.load(top_p + item)
    done = (p >= 1) | _is_short(numbers, item, TILES, TILES_PAD, SHORTLIST)
    if (k >= VOCAB) & done:
        return
    row = tl.load(rows + item)
    source = logits + row * stride
    scale = _LOG2_E / tl.load(temperatures + row)
    maximum = _maxima(maxima, item, BUCKETS, BUCKETS_PAD)
    highest = tl.max(maximum, axis=0)
    peak = _finite(highest)
    bottom, top = _all_keys(highest, SHIFT)
    stay = tl.full([], VOCAB, tl.float32)  # how many of the logits equal to the threshold
    # NOTE: a plain 0.0 is a constant, and its type would change within a loop.
    none = tl.zeros([], tl.float32)
    least, target, weight_above = bottom, stay, none
    if k < VOCAB:
        bottom = _kth_largest(maximum, k, bottom, top, SHIFT)
    else:
        bottom, top, weight_above, total = _range(
            keys, above, sums, passes, item, highest, p, PIVOTS, TILES, TILES_PAD, SHIFT
        )
        target = p * total

    # List the buckets that may hold a logit that stays.
    listed += item * BUCKETS
    wanted = (maximum >= _value(bottom, SHIFT)).to(tl.int32)
    tl.store(listed + tl.cumsum(wanted, axis=0) - 1, tl.arange(0, BUCKETS_PAD), mask=wanted > 0)
    count = tl.sum(wanted, axis=0)
    tl.debug_barrier()  # all of the list is stored before any thread reads it

    if k < VOCAB:
        target = k.to(tl.float32)
        bottom, weight_above = _search(
            source, listed, count, target, bottom, top, none, peak, 0.0, VOCAB, BUCKET, SHIFT
        )
        least, stay, weight_above = bottom, target - weight_above, none
        if p < 1:
            more = _weight_from(source, listed, count, least + 1, peak, scale, VOCAB, BUCKET, SHIFT)
            target = p * (more + stay * _weight(_value(least, SHIFT), peak, scale))
    if p < 1:
        bottom, weight_above = _search(
            source, listed, count, target, bottom, top, weight_above, peak, scale,
            VOCAB, BUCKET, SHIFT,
        )  # fmt: skip
        one = tl.maximum(_weight(_value(bottom, SHIFT), peak, scale), 1e-37)
        needed = tl.ceil((target - weight_above) / one)
        stay = tl.where(bottom == least, tl.minimum(needed, stay), needed)
    threshold = _value(bottom, SHIFT)
    tl.store(thresholds + row, threshold)
    stay = tl.minimum(tl.maximum(stay, 1.0), VOCAB).to(tl.int32)
    tie_end = _tie_end(source, listed, count, threshold, stay, VOCAB, BUCKET)
    tl.store(tie_ends + row, tie_end)


# ------------------------------------------------------------------ searches


@triton.jit
def _range(
    keys, above, sums, step, item, highest, limit,
    PIVOTS: tl.constexpr, TILES: tl.constexpr, TILES_PAD: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Before pass `step`: the key searched for is one from `bottom` to `top` - 1.

    Also the weight from `top` on, and that of all logits.
    """
    bottom, top = _all_keys(highest, SHIFT)
    weight_above = tl.zeros([], tl.float32)
    total = tl.zeros([], tl.float32)
    if step > 0:
        place = (step - 1) * tl.num_programs(0) + item
        keys += place * (PIVOTS + 1)
        bottom, top = tl.load(keys), tl.load(keys + PIVOTS)
        weight_above = tl.load(above + place)
        tile, pivot = tl.arange(0, TILES_PAD), tl.arange(0, PIVOTS)
        # The first pivot of the first pass is below all logits.
        first = sums + (item * TILES + tile) * PIVOTS
        total = tl.sum(tl.load(first, mask=tile < TILES, other=0.0), axis=0)
        if top - bottom > 1:
            part = sums + (place * TILES + tile[:, None]) * PIVOTS + pivot[None, :]
            weight = tl.sum(tl.load(part, mask=tile[:, None] < TILES, other=0.0), axis=0)
            key = tl.load(keys + pivot)
            enough = weight >= limit * total
            weight_above = tl.max(tl.where(enough, weight_above, weight), axis=0)
            bottom = tl.max(tl.where(enough, key, bottom), axis=0)
            top = tl.min(tl.where(enough, top, key), axis=0)
    return bottom, top, weight_above, total


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
        reached = value >= _value(key, SHIFT)
        total += tl.sum(tl.where(reached, _weight(value, peak, scale), 0.0))
    return total


@triton.jit
def _kth_largest(maximum, k, bottom, top, SHIFT: tl.constexpr):
    """The largest key below `top` that at least k of these reach, or `bottom`."""
    for _ in range(32 - SHIFT):
        half = bottom + (top - bottom) // 2
        enough = tl.sum((maximum >= _value(half, SHIFT)).to(tl.int32), axis=0) >= k
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


# ------------------------------------------------------------------ logits, weights, keys


@triton.jit
def _load(source, token, VOCAB: tl.constexpr):
    """Logits in float32; NaN and what is beyond the vocabulary are -inf."""
    value = tl.load(source + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def _load_listed(
    source, listed, first, count, COUNT: tl.constexpr, VOCAB: tl.constexpr, BUCKET: tl.constexpr
):
    """Logits and tokens ``[COUNT, BUCKET]`` of the listed buckets from the first-th on."""
    place = first + tl.arange(0, COUNT)
    bucket = tl.load(listed + place, mask=place < count, other=VOCAB)
    token = bucket[:, None] * BUCKET + tl.arange(0, BUCKET)[None, :]
    return _load(source, token, VOCAB), token


@triton.jit
def _maxima(maxima, item, BUCKETS: tl.constexpr, BUCKETS_PAD: tl.constexpr):
    bucket = tl.arange(0, BUCKETS_PAD)
    return tl.load(maxima + item * BUCKETS + bucket, mask=bucket < BUCKETS, other=float("-inf"))


@triton.jit
def _finite(value):
    return tl.minimum(tl.maximum(value, -_MAX), _MAX)


@triton.jit
def _weight(value, peak, scale):
    """``exp((value - peak) / temperature)``: probability, but for a factor."""
    return tl.exp2((_finite(value) - peak) * scale)


@triton.jit
def _all_keys(highest, SHIFT: tl.constexpr):
    """The least key of a finite logit, and the key behind the highest of a row."""
    bottom = _key(tl.minimum(_finite(highest), -_MAX), SHIFT)
    # NOTE: + 0.0 makes 0 of -0, whose key is another though they are equal.
    return bottom, tl.maximum(_key(highest + 0.0, SHIFT) + 1, bottom)


@triton.jit
def _key(value, SHIFT: tl.constexpr):
    """An int64 that orders floats as they are ordered, rounded down by SHIFT bits."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT).to(tl.int64)


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The float32 that has this key, and ends with SHIFT zeros."""
    KEPT: tl.constexpr = (0x7FFFFFFF >> SHIFT) << SHIFT
    bits = key << SHIFT
    bits = tl.where(key < 0, bits ^ KEPT, bits)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)
