"""What ranks need of their parts of a split vocabulary for top-k and top-p.

Floor: read F V elements. ``weigh`` has a program per row and tile. Where tokens are listed or
counted in order, a program takes a whole row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.reference import KEY_SHIFTS
from nanovllm.kernels.top_k_top_p import _LOG2_E, TILE, _load, _value, _weight

ROW_TILE = 4096  # of a program that takes a whole row


def weigh(
    logits: Tensor, temperatures: Tensor, rows: Tensor, peaks: Tensor, keys: Tensor
) -> Tensor:
    """See ``reference.weigh``; float32, and rows of the logits may be strided, a row may not."""
    (count, pivots), vocab = keys.shape, logits.shape[1]
    tiles = triton.cdiv(vocab, TILE)
    sums = torch.empty(count, max(tiles, 1), pivots, 2, dtype=torch.float32, device=logits.device)
    if tiles == 0:
        return sums.zero_().sum(1)
    _weigh_kernel[(count, tiles)](
        logits, temperatures, rows, peaks, keys, sums, logits.stride(0),
        VOCAB=vocab, TILE=TILE, PIVOTS=pivots, SHIFT=KEY_SHIFTS.get(logits.dtype, 0), num_warps=4,
    )  # fmt: skip
    return sums.sum(1)


@triton.jit(do_not_specialize=["temperatures", "rows", "peaks", "keys"])
def _weigh_kernel(
    logits, temperatures, rows, peaks, keys, sums, stride,
    VOCAB: tl.constexpr, TILE: tl.constexpr, PIVOTS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    item, tile = tl.program_id(0), tl.program_id(1)
    row = tl.load(rows + item)
    value = _load(logits + row * stride, tile * TILE + tl.arange(0, TILE), VOCAB)
    weight = _weight(value, tl.load(peaks + item), _LOG2_E / tl.load(temperatures + row))
    place = sums + (item * tl.num_programs(1) + tile) * PIVOTS * 2
    for pivot in tl.static_range(PIVOTS):
        reached = (value >= _value(tl.load(keys + item * PIVOTS + pivot), SHIFT)).to(tl.float32)
        tl.store(place + 2 * pivot, tl.sum(reached, axis=0))
        tl.store(place + 2 * pivot + 1, tl.sum(reached * weight, axis=0))


def collect(
    logits: Tensor, rows: Tensor, threshold: tuple[Tensor, Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """See ``reference.collect``; rows of the logits may be strided, a row may not."""
    values = torch.empty(len(rows), count, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(len(rows), count, dtype=torch.int32, device=logits.device)
    _collect_kernel[(len(rows),)](
        logits, rows, *threshold, values, tokens, logits.stride(0),
        VOCAB=logits.shape[1], TILE=ROW_TILE, COUNT=count, PAD=triton.next_power_of_2(count),
        num_warps=8,
    )  # fmt: skip
    return values, tokens


def tie_end(logits: Tensor, rows: Tensor, values: Tensor, stay: Tensor) -> Tensor:
    """See ``reference.tie_end``; rows of the logits may be strided, a row may not."""
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
        value = _load(logits + row * stride, token, VOCAB)
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
        ties = _load(logits + row * stride, token, VOCAB) == wanted
        number = tl.sum(ties.to(tl.int32), axis=0)
        if (number > 0) & (left > 0):
            first = ties & (tl.cumsum(ties.to(tl.int32), axis=0) <= left)
            end = tl.maximum(end, tl.max(tl.where(first, token, -1), axis=0))
        left -= number
    tl.store(ends + item, end)
