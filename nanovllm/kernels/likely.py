"""Where the likely tokens of a row end: top-k and top-p without sorting.

The logits that stay are those above one logit of the row, the floor, and of those equal to it the
first few. The floor is searched for by value: the bits of a float, put in order, are an integer
key, and one pass over the row tells how much (tokens, or probability) lies at and above seven keys
between two ends. That leaves an eighth of the keys, and so on until one is left.

- ``_survey_kernel`` finds the maximum of every 256 logits. At least k logits reach the k-th largest
  of these, so the search for top-k begins there. The search for top-p begins so far below the
  peak that the whole vocabulary down there would have less than 1 - p. Most rows then need two or
  three passes.
- ``_narrow_kernel`` is a pass; it begins with what the pass before has found. The host launches as
  many as any row may need, and those that a row does not need end at once. First come the
  passes for top-k, then those for top-p of what top-k has left.
- ``_tie_kernel`` and ``_last_kernel`` find the last token that stays of those equal to the floor.

A sum over a row is added up in the same order whatever the batch, and so are its draws the same.
Floor: read the logits of the filtered rows once; each pass reads them again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 8192
_GROUP = 256  # logits of which the survey keeps the maximum
_PIVOTS = 8  # sums of a pass: one for everything, the others for keys between the ends
# Zeros at the end of such a value's float32: keys go without them.
_SHIFTS = {torch.bfloat16: 16, torch.float16: 13}
_LOG2_E = tl.constexpr(1.4426950408889634)
_MAX = tl.constexpr(3.4028234663852886e38)


def find_threshold(
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.find_threshold``; rows of the logits may be strided, a row may not."""
    vocab = logits.shape[1]
    thresholds = torch.full(
        (len(logits),), float("-inf"), dtype=torch.float32, device=logits.device
    )
    tie_ends = torch.full((len(logits),), vocab, dtype=torch.int32, device=logits.device)
    if len(rows) > 0 and (top_k is not None or top_p is not None):
        _launch(logits, temperatures, rows, top_k, top_p, thresholds, tie_ends)
    return thresholds, tie_ends


def num_passes(shift: int) -> int:
    """Passes that leave one of 2^(32 - shift) keys, if each leaves an eighth."""
    return -(-(32 - shift) // (_PIVOTS.bit_length() - 1))


def _launch(
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    thresholds: Tensor,
    tie_ends: Tensor,
) -> None:
    count, vocab, stride = len(rows), logits.shape[1], logits.stride(0)
    tiles = triton.cdiv(vocab, TILE)
    num_maxima = tiles * (TILE // _GROUP)
    shift = _SHIFTS.get(logits.dtype, 0)
    passes = num_passes(shift)

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    maxima, wanted = scratch(count, num_maxima), scratch(count, dtype=torch.int32)
    ties = scratch(count, tiles, dtype=torch.int32)
    # Of each search: its ends before every pass, and the sums of the latest two passes.
    ends = scratch(passes + 1, count, 2, dtype=torch.int64)
    weights, sums = scratch(passes + 1, count, 2), scratch(2, count, tiles, _PIVOTS)
    state = (ends, weights, sums, count)
    whole = {"VOCAB": vocab, "TILE": TILE, "num_warps": 8}
    padded = {"TILES": tiles, "TILES_PAD": triton.next_power_of_2(tiles)}
    search = {**padded, "PIVOTS": _PIVOTS, "SHIFT": shift}

    _survey_kernel[(count, tiles)](logits, rows, maxima, stride, GROUP=_GROUP, **whole)
    facts: Tensor | None = None
    for limits in (top_k, top_p):
        if limits is None:
            continue
        before, facts = facts, scratch(count, 8)
        by_mass = limits is top_p
        _begin_kernel[(count,)](
            maxima, rows, temperatures, limits, before, facts, *state, passes,
            VOCAB=vocab, MAXIMA=num_maxima, MAXIMA_PAD=triton.next_power_of_2(num_maxima),
            BY_MASS=by_mass, **search,
        )  # fmt: skip
        for turn in range(1, passes + 1):
            _narrow_kernel[(count, tiles)](
                logits, rows, facts, *state, turn, stride, BY_MASS=by_mass, **search, **whole
            )
    by_mass = top_p is not None
    _finish_kernel[(count,)](
        rows, facts, *state, passes, thresholds, wanted, VOCAB=vocab, BY_MASS=by_mass, **search
    )
    _tie_kernel[(count, tiles)](logits, rows, thresholds, ties, stride, **whole)
    _last_kernel[(count,)](
        logits, rows, thresholds, wanted, ties, tie_ends, stride, **padded, **whole
    )


# ------------------------------------------------------------------ kernels, in their order
#
# `item` is a filtered row, `row` its place among all rows. NaN counts as -inf. What varies with the
# batch, such as the alignment of its options, is not specialised: that would compile anew.


@triton.jit(do_not_specialize=["rows"])
def _survey_kernel(
    logits, rows, maxima, row_stride,
    VOCAB: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The maximum of every GROUP logits of a tile."""
    item, tile = tl.program_id(0), tl.program_id(1)
    group = tl.arange(0, TILE // GROUP)
    token = tile * TILE + group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    place = logits + tl.load(rows + item) * row_stride + token
    value = tl.load(place, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    value = tl.where(value == value, value, float("-inf"))
    first = (item * tl.num_programs(1) + tile) * (TILE // GROUP)
    tl.store(maxima + first + group, tl.max(value, axis=1))


@triton.jit(do_not_specialize=["rows", "temperatures", "limits", "count", "passes"])
def _begin_kernel(
    maxima, rows, temperatures, limits, before, facts, ends, weights, sums, count, passes,
    VOCAB: tl.constexpr, MAXIMA: tl.constexpr, MAXIMA_PAD: tl.constexpr, BY_MASS: tl.constexpr,
    TILES: tl.constexpr, TILES_PAD: tl.constexpr, PIVOTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The ends of a row's search, and what else its passes need to know.

    The ends are keys: the floor is at least ``bottom`` and less than ``top``.
    """
    item = tl.program_id(0)
    index = tl.arange(0, MAXIMA_PAD)
    held = tl.load(maxima + item * MAXIMA + index, mask=index < MAXIMA, other=float("-inf"))
    highest = tl.max(held, axis=0)
    peak = tl.minimum(tl.maximum(highest, -_MAX), _MAX)
    scale = _LOG2_E / tl.load(temperatures + tl.load(rows + item))
    limit = tl.load(limits + item).to(tl.float32)
    lowest = _key(tl.minimum(peak, -_MAX), SHIFT)
    top = tl.maximum(_key(highest, SHIFT) + 1, lowest)  # no more than lowest: a row of -inf
    base, spare = lowest, 1.0 * VOCAB  # what stays at most: above base, and so many of it
    if BY_MASS:
        if before is not None:
            base, _, more, _ = _ends_of(
                before, ends, weights, sums, count, passes, item,
                False, TILES, TILES_PAD, PIVOTS, SHIFT,
            )  # fmt: skip
            spare = tl.load(before + item * 8 + 2) - more
        # So far below the peak, the vocabulary has half of 1 - p at most. At least one pass is
        # left to do, which finds the weight of all, unless it is known: nothing is above base.
        depth = tl.log2(VOCAB / tl.maximum(1 - limit, 2.0**-24)) + 1
        bottom = tl.maximum(_key(peak - depth / scale, SHIFT) - 1, base)
        unlimited = limit >= 1
    else:
        limit = tl.minimum(limit, VOCAB)
        bottom = _reached(held, limit, lowest, top, SHIFT)
        unlimited = limit >= VOCAB
    tl.store(facts + item * 8, scale)
    tl.store(facts + item * 8 + 1, peak)
    tl.store(facts + item * 8 + 2, limit)
    tl.store(facts + item * 8 + 3, _value(base, SHIFT))
    tl.store(facts + item * 8 + 4, spare)
    bottom = tl.where(unlimited, base, bottom)
    top = tl.where(unlimited, base + 1, top)
    _store_ends(ends, weights, item, bottom, top, 0.0, 0.0)


@triton.jit(do_not_specialize=["rows", "count", "turn"])
def _narrow_kernel(
    logits, rows, facts, ends, weights, sums, count, turn, row_stride,
    BY_MASS: tl.constexpr, TILES: tl.constexpr, TILES_PAD: tl.constexpr, PIVOTS: tl.constexpr,
    SHIFT: tl.constexpr, VOCAB: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile's part of a pass: how much of the tile is at and above each pivot."""
    item, tile = tl.program_id(0), tl.program_id(1)
    bottom, top, above, total = _ends_of(
        facts, ends, weights, sums, count, turn - 1, item,
        BY_MASS, TILES, TILES_PAD, PIVOTS, SHIFT,
    )  # fmt: skip
    if tile == 0:
        _store_ends(ends, weights, turn * count + item, bottom, top, above, total)
    if top - bottom <= 1:
        return
    value = _logits_of(logits, rows, item, tile, row_stride, VOCAB, TILE)
    weight = tl.full([TILE], 1.0, tl.float32)
    if BY_MASS:
        value = tl.where(value == value, value, float("-inf"))  # or 0 * NaN would be added
        weight = _weight(facts, item, value)
    place = sums + ((turn % 2 * count + item) * TILES + tile) * PIVOTS
    base = _key(tl.load(facts + item * 8 + 3), SHIFT)
    # The first sum is of all above the base; a count needs no total.
    for pivot in tl.static_range(0 if BY_MASS else 1, PIVOTS):
        key = _pivot(bottom, top, pivot, PIVOTS) if pivot > 0 else base + 1
        # A factor, not a choice: a product and its sum are one instruction.
        reached = (value >= _value(key, SHIFT)).to(tl.float32)
        tl.store(place + pivot, tl.sum(reached * weight, axis=0))


@triton.jit(do_not_specialize=["rows", "count", "passes"])
def _finish_kernel(
    rows, facts, ends, weights, sums, count, passes, thresholds, wanted,
    VOCAB: tl.constexpr, BY_MASS: tl.constexpr, TILES: tl.constexpr, TILES_PAD: tl.constexpr,
    PIVOTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The floor of a row, and how many tokens stay of those that are equal to it."""
    item = tl.program_id(0)
    key, _, above, total = _ends_of(
        facts, ends, weights, sums, count, passes, item,
        BY_MASS, TILES, TILES_PAD, PIVOTS, SHIFT,
    )  # fmt: skip
    floor = _value(key, SHIFT)
    limit = tl.load(facts + item * 8 + 2)
    if BY_MASS:
        spare = tl.load(facts + item * 8 + 4)
        at_base = key == _key(tl.load(facts + item * 8 + 3), SHIFT)
        missing = _target(facts, item, total, BY_MASS) - above
        stay = tl.ceil(missing / tl.maximum(_weight(facts, item, floor), 1e-37))
        stay = tl.where(at_base, tl.minimum(stay, spare), stay)
        stay = tl.where(limit >= 1, spare, stay)
    else:
        stay = limit - above
    tl.store(thresholds + tl.load(rows + item), floor)
    tl.store(wanted + item, tl.minimum(tl.maximum(stay, 1.0), VOCAB).to(tl.int32))


@triton.jit(do_not_specialize=["rows"])
def _tie_kernel(
    logits, rows, thresholds, ties, row_stride, VOCAB: tl.constexpr, TILE: tl.constexpr
):
    """How many of a tile's logits are equal to the floor."""
    item, tile = tl.program_id(0), tl.program_id(1)
    value = _logits_of(logits, rows, item, tile, row_stride, VOCAB, TILE)
    equal = value == tl.load(thresholds + tl.load(rows + item))
    tl.store(ties + item * tl.num_programs(1) + tile, tl.sum(equal.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["rows"])
def _last_kernel(
    logits, rows, thresholds, wanted, ties, tie_ends, row_stride,
    TILES: tl.constexpr, TILES_PAD: tl.constexpr, VOCAB: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The last token that stays of those that are equal to the floor."""
    item = tl.program_id(0)
    row = tl.load(rows + item)
    index = tl.arange(0, TILES_PAD)
    of_tile = tl.load(ties + item * TILES + index, mask=index < TILES, other=0)
    stay = tl.minimum(tl.load(wanted + item), tl.sum(of_tile, axis=0))
    # Tiles, and then tokens, before which there are too few.
    too_few = tl.cumsum(of_tile, axis=0) < stay
    tile = tl.sum(too_few.to(tl.int32), axis=0)
    stay -= tl.sum(tl.where(too_few, of_tile, 0), axis=0)
    value = _logits_of(logits, rows, item, tile, row_stride, VOCAB, TILE)
    equal = (value == tl.load(thresholds + row)).to(tl.int32)
    place = tl.sum((tl.cumsum(equal, axis=0) < stay).to(tl.int32), axis=0)
    tl.store(tie_ends + row, tile * TILE + place)


# ------------------------------------------------------------------ a search's state


@triton.jit
def _ends_of(
    facts, ends, weights, sums, count, turn, item,
    BY_MASS: tl.constexpr, TILES: tl.constexpr, TILES_PAD: tl.constexpr, PIVOTS: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The ends after pass `turn` (0: at the beginning), the weight from ``top`` on, and of all."""
    place = turn * count + item
    bottom = tl.load(ends + 2 * place)
    top = tl.load(ends + 2 * place + 1)
    above = tl.load(weights + 2 * place)
    total = tl.load(weights + 2 * place + 1)

    passed = (turn > 0) & (top - bottom > 1)  # else the pass has left no sums
    tile = tl.arange(0, TILES_PAD)[:, None]
    pivot = tl.arange(0, PIVOTS)
    element = ((turn % 2 * count + item) * TILES + tile) * PIVOTS + pivot[None, :]
    parts = tl.load(sums + element, mask=tile < tl.where(passed, TILES, 0), other=0.0)
    weight = tl.sum(parts, axis=0)
    total = tl.where(passed, tl.sum(tl.where(pivot == 0, weight, 0.0), axis=0), total)
    enough = weight >= _target(facts, item, total, BY_MASS)
    key = _pivot(bottom, top, pivot, PIVOTS)
    inside = key > tl.where(passed, bottom, top)
    above = tl.max(tl.where(inside & ~enough, weight, above), axis=0)
    top = tl.min(tl.where(inside & ~enough, key, top), axis=0)
    bottom = tl.max(tl.where(inside & enough, key, bottom), axis=0)
    return bottom, top, above, total


@triton.jit
def _store_ends(ends, weights, place, bottom, top, above, total):
    tl.store(ends + 2 * place, bottom)
    tl.store(ends + 2 * place + 1, top)
    tl.store(weights + 2 * place, above)
    tl.store(weights + 2 * place + 1, total)


@triton.jit
def _target(facts, item, total, BY_MASS: tl.constexpr):
    """The weight at which enough tokens stay; `total` is that of all tokens above the base."""
    limit = tl.load(facts + item * 8 + 2)
    if BY_MASS:
        base, spare = tl.load(facts + item * 8 + 3), tl.load(facts + item * 8 + 4)
        limit *= total + spare * _weight(facts, item, base)
    return limit


@triton.jit
def _weight(facts, item, value):
    """``exp((value - peak) / temperature)``: probability, but for a factor."""
    scale, peak = tl.load(facts + item * 8), tl.load(facts + item * 8 + 1)
    return tl.exp2((tl.minimum(value, _MAX) - peak) * scale)


@triton.jit
def _reached(held, count, lowest, top, SHIFT: tl.constexpr):
    """The largest key below `top` that at least `count` of `held` reach, or `lowest`."""
    bottom = lowest
    for _ in range(32 - SHIFT):
        middle = bottom + (top - bottom) // 2
        enough = tl.sum((held >= _value(middle, SHIFT)).to(tl.int32), axis=0) >= count
        bottom = tl.where(enough, middle, bottom)
        top = tl.where(enough, top, middle)
    return bottom


# ------------------------------------------------------------------ values and keys


@triton.jit
def _logits_of(logits, rows, item, tile, row_stride, VOCAB: tl.constexpr, TILE: tl.constexpr):
    """A tile in float32; -inf beyond the vocabulary."""
    token = tile * TILE + tl.arange(0, TILE)
    place = logits + tl.load(rows + item) * row_stride + token
    return tl.load(place, mask=token < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def _pivot(bottom, top, index, PIVOTS: tl.constexpr):
    """The key at `index` of PIVOTS equal steps from `bottom` to `top`."""
    return bottom + (top - bottom) * index // PIVOTS


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
