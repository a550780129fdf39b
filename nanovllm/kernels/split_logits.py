"""Number and weight of the logits from certain keys on; top-k and top-p of a split vocabulary.

One program per row and tile reads its logits once. Floor: read F V elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.reference import KEY_SHIFTS
from nanovllm.kernels.top_k_top_p import _LOG2_E, TILE, _load, _value, _weight


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
