"""What ranks need of their parts of a split vocabulary for top-k and top-p.

Floor: read F V elements. ``narrow`` has a program per row and tile. Where tokens are listed or
counted in order, a program takes a whole row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.logit_keys import LOG2_E, load_logits, value_of, weight_of
from nanovllm.kernels.reference_sampling import KEY_SHIFTS, PIVOTS, Search
from nanovllm.kernels.top_k_top_p import TILE

ROW_TILE = 4096  # of a program that takes a whole row


def narrow(
    logits: Tensor,
    temperatures: Tensor,
    rows: Tensor,
    peaks: Tensor,
    search: Search,
    gathered: Tensor | None,
    target: Tensor,
    counted: bool,
) -> tuple[Search, Tensor]:
    """See ``reference_sampling.narrow``; rows of the logits may be strided, a row may not."""
    count, vocab = len(rows), logits.shape[1]
    tiles = max(triton.cdiv(vocab, TILE), 1)
    sums = torch.empty(count, tiles, PIVOTS, dtype=torch.float32, device=logits.device)
    result = Search(*map(torch.empty_like, search))
    parts = 0 if gathered is None else len(gathered)
    _narrow_kernel[(count, tiles)](
        logits, temperatures, rows, peaks, *search, *result, gathered, target, sums,
        logits.stride(0),
        VOCAB=vocab, TILE=TILE, PIVOTS=PIVOTS, PARTS=parts, COUNTED=counted,
        SHIFT=KEY_SHIFTS.get(logits.dtype, 0), num_warps=4,
    )  # fmt: skip
    return result, sums.sum(1)


@triton.jit(do_not_specialize=["temperatures", "rows", "target"])
def _narrow_kernel(
    logits, temperatures, rows, peaks, bottoms, tops, aboves, new_bottoms, new_tops, new_aboves,
    gathered, target, sums, stride,
    VOCAB: tl.constexpr, TILE: tl.constexpr, PIVOTS: tl.constexpr, PARTS: tl.constexpr,
    COUNTED: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    item, tile = tl.program_id(0), tl.program_id(1)
    bottom, top, above = tl.load(bottoms + item), tl.load(tops + item), tl.load(aboves + item)
    pivot = tl.arange(0, PIVOTS)
    if gathered is not None:
        weight = tl.zeros([PIVOTS], tl.float64)
        for part in tl.static_range(PARTS):
            place = (part * tl.num_programs(0) + item) * PIVOTS
            weight += tl.load(gathered + place + pivot).to(tl.float64)
        found = weight.to(tl.float32)
        key = bottom + (top - bottom) * pivot // PIVOTS
        enough = found >= tl.load(target + item)
        above = tl.max(tl.where(enough | (pivot == 0), above, found), axis=0)
        top = tl.min(tl.where(enough | (pivot == 0), top, key), axis=0)
        bottom = tl.max(tl.where(enough, key, bottom), axis=0)
    if tile == 0:
        tl.store(new_bottoms + item, bottom)
        tl.store(new_tops + item, top)
        tl.store(new_aboves + item, above)
    row = tl.load(rows + item)
    value = load_logits(logits + row * stride, tile * TILE + tl.arange(0, TILE), VOCAB)
    weights = weight_of(value, tl.load(peaks + item), LOG2_E / tl.load(temperatures + row))
    place = sums + (item * tl.num_programs(1) + tile) * PIVOTS
    for step in tl.static_range(PIVOTS):
        least = value_of(bottom + (top - bottom) * step // PIVOTS, SHIFT)
        # A factor, not a choice: a product and its sum are one instruction.
        reached = (value >= least).to(tl.float32)
        tl.store(place + step, tl.sum(reached if COUNTED else reached * weights, axis=0))


def collect(
    logits: Tensor, rows: Tensor, threshold: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """See ``reference_sampling.collect``; rows of the logits may be strided, a row may not."""
    values = torch.empty(len(rows), count, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(len(rows), count, dtype=torch.int32, device=logits.device)
    _collect_kernel[(len(rows),)](
        logits, rows, *threshold, values, tokens, logits.stride(0),
        VOCAB=logits.shape[1], TILE=ROW_TILE, COUNT=count, PAD=triton.next_power_of_2(count),
        num_warps=8,
    )  # fmt: skip
    return values, tokens


def tie_end(logits: Tensor, rows: Tensor, values: Tensor, stay: Tensor) -> Tensor:
    """See ``reference_sampling.tie_end``; rows of the logits may be strided, a row may not."""
    ends = torch.empty(len(rows), dtype=torch.int32, device=logits.device)
    _tie_end_kernel[(len(rows),)](
        logits, rows, values, stay, ends, logits.stride(0),
        VOCAB=logits.shape[1], TILE=ROW_TILE, num_warps=8,
    )  # fmt: skip
    return ends


@triton.jit(do_not_specialize=["rows"])
def _collect_kernel(
    logits, rows, thresholds, tie_ends, values, tokens, stride,
    VOCAB: tl.constexpr, TILE: tl.constexpr, COUNT: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    row = tl.load(rows + item)
    least, end = tl.load(thresholds + row), tl.load(tie_ends + row)
    found = tl.zeros([], tl.int32)
    for start in range(0, VOCAB, TILE):
        token = start + tl.arange(0, TILE)
        value = load_logits(logits + row * stride, token, VOCAB)
        stays = (value > least) | ((value == least) & (token <= end))
        stays = stays & (value > float("-inf"))
        number = tl.sum(stays.to(tl.int32), axis=0)
        if number > 0:  # seldom
            place = found + tl.cumsum(stays.to(tl.int32), axis=0) - 1
            stays = stays & (place < COUNT)
            tl.store(values + item * COUNT + place, value, mask=stays)
            tl.store(tokens + item * COUNT + place, token, mask=stays)
        found += number
    place = tl.arange(0, PAD)
    rest = (place >= found) & (place < COUNT)
    tl.store(values + item * COUNT + place, float("-inf"), mask=rest)
    tl.store(tokens + item * COUNT + place, -1, mask=rest)


@triton.jit(do_not_specialize=["rows"])
def _tie_end_kernel(
    logits, rows, values, stay, ends, stride, VOCAB: tl.constexpr, TILE: tl.constexpr
):
    item = tl.program_id(0)
    row, wanted = tl.load(rows + item), tl.load(values + item)
    left = tl.load(stay + item)
    end = tl.full([], -1, tl.int32)
    for start in range(0, VOCAB, TILE):
        token = start + tl.arange(0, TILE)
        ties = load_logits(logits + row * stride, token, VOCAB) == wanted
        number = tl.sum(ties.to(tl.int32), axis=0)
        if (number > 0) & (left > 0):
            first = ties & (tl.cumsum(ties.to(tl.int32), axis=0) <= left)
            end = tl.maximum(end, tl.max(tl.where(first, token, -1), axis=0))
        left -= number
    tl.store(ends + item, end)
