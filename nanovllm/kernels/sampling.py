"""Greedy and temperature sampling at the speed of reading the logits.

Noise for every token would take several times as long as reading the logits. So a draw has two
levels. One program per row and tile of the vocabulary computes the tile's log-sum-exp (greedy: its
maximum), the only pass over all logits. Then one program per row draws a tile, reads it again and
draws a token of it. ``reference`` has the formulas and their sources; here logarithms and
exponentials are to base 2, which scales all scores of a draw alike. Floor: read N V elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.logit_keys import LOG2_E, key_of
from nanovllm.kernels.reference_sampling import BROKEN, NOTHING, SAMPLE_TILE

_BROKEN, _NOTHING = tl.constexpr(BROKEN), tl.constexpr(NOTHING)


def sample(
    logits: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    steps: Tensor,
    threshold: tuple[Tensor, Tensor] | None = None,
    part: tuple[int, int] | None = None,
) -> Tensor:
    """See ``reference_sampling.sample``; rows of the logits may be strided, a row may not."""
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, SAMPLE_TILE)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if vocab == 0:
        return tokens.fill_(NOTHING)
    if rows == 0:
        return tokens
    first, whole = part or (0, vocab)
    weights = torch.empty(rows, tiles, dtype=torch.float32, device=logits.device)
    stride = logits.stride(0)
    thresholds, tie_ends = threshold or (None, None)
    _weigh_kernel[(rows, tiles)](
        logits, temperatures, thresholds, tie_ends, weights, stride,
        VOCAB=vocab, TILE=SAMPLE_TILE, num_warps=8,
    )  # fmt: skip
    _draw_kernel[(rows,)](
        logits, temperatures, seeds, steps, thresholds, tie_ends, weights, tokens, stride,
        VOCAB=vocab, TILE=SAMPLE_TILE, NUM_TILES=tiles, TILES_PAD=triton.next_power_of_2(tiles),
        FIRST_TILE=first // SAMPLE_TILE, ALL_TILES=triton.cdiv(whole, SAMPLE_TILE),
        KEYS=part is not None, num_warps=8,
    )  # fmt: skip
    return tokens


# NOTE: the options of a batch are views with an alignment that varies with its size. If Triton
# specialised on that, a kernel would be compiled in the middle of a run.
@triton.jit(do_not_specialize=["temperatures"])
def _weigh_kernel(
    logits, temperatures, thresholds, tie_ends, weights, row_stride,
    VOCAB: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of one row's logits in one tile, or their maximum at temperature 0.

    NaN if one of them is.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    temperature = tl.load(temperatures + row)
    score = _scores(logits, row, row_stride, tile, temperature, thresholds, tie_ends, VOCAB, TILE)
    broken = tl.max((score != score).to(tl.int32), axis=0) > 0
    score = tl.where(score == score, score, float("-inf"))
    weight = tl.max(score, axis=0)
    if temperature > 0:
        # Finite, so that a tile with nothing but -inf, or with inf, does not weigh NaN.
        peak = tl.minimum(tl.maximum(weight, -3.0e38), 3.0e38)
        weight = peak + tl.log2(tl.sum(tl.exp2(score - peak), axis=0))
    weight = tl.where(broken, float("nan"), weight)
    tl.store(weights + row * tl.num_programs(1) + tile, weight)


@triton.jit(do_not_specialize=["temperatures", "seeds", "steps"])
def _draw_kernel(
    logits, temperatures, seeds, steps, thresholds, tie_ends, weights, tokens, row_stride,
    VOCAB: tl.constexpr, TILE: tl.constexpr, NUM_TILES: tl.constexpr, TILES_PAD: tl.constexpr,
    FIRST_TILE: tl.constexpr, ALL_TILES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Draw a tile of one row by its weight, then a token of the tile; of equals the lowest.

    With KEYS, of a part of the vocabulary, store the draw's key instead.
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    seed = tl.load(seeds + row)
    step = tl.load(steps + row)

    tiles = tl.arange(0, TILES_PAD)
    inside = tiles < NUM_TILES
    weight = tl.load(weights + row * NUM_TILES + tiles, mask=inside, other=float("-inf"))
    broken = tl.max((weight != weight).to(tl.int32), axis=0) > 0
    # NOTE: a NaN is no maximum, so it could let the draw end in a lane beyond the vocabulary.
    weight = tl.where(weight == weight, weight, float("-inf"))
    empty = tl.max(weight, axis=0) == float("-inf")
    if temperature > 0:
        weight += _gumbel(seed, step, ALL_TILES * TILE + FIRST_TILE + tiles)
    best, tile = tl.max(weight, axis=0, return_indices=True)

    score = _scores(logits, row, row_stride, tile, temperature, thresholds, tie_ends, VOCAB, TILE)
    if temperature > 0:
        score += _gumbel(seed, step, (FIRST_TILE + tile) * TILE + tl.arange(0, TILE))
    score = tl.where(score == score, score, float("-inf"))
    _, place = tl.max(score, axis=0, return_indices=True)
    token = ((FIRST_TILE + tile) * TILE + place).to(tl.int64)
    if KEYS:
        # NOTE: + 0.0 makes 0 of -0, whose bits are others though they are equal.
        ordered = key_of(best + 0.0, 0)
        key = (ordered << 32) | (0xFFFFFFFF - token)
        key = tl.where(empty, _NOTHING, key)
        tl.store(tokens + row, tl.where(broken, _BROKEN, key))
    else:
        tl.store(tokens + row, tl.where(broken | empty, -1, token))


@triton.jit
def _scores(
    logits, row, row_stride, tile, temperature, thresholds, tie_ends,
    VOCAB: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """``logits / temperature * log2(e)`` of a tile, or just the logits at temperature 0.

    What is below the row's threshold, if there is one, is -inf; NaN stays NaN.
    """
    token = tile * TILE + tl.arange(0, TILE)
    place = logits + row * row_stride + token
    score = tl.load(place, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    if thresholds is not None:
        least = tl.load(thresholds + row)
        stays = (score > least) | ((score == least) & (token <= tl.load(tie_ends + row)))
        score = tl.where(stays | (score != score), score, float("-inf"))
    return score * tl.where(temperature > 0, LOG2_E / tl.maximum(temperature, 1e-30), 1.0)


@triton.jit
def _gumbel(seed, step, index):
    """Gumbel noise times log2(e) for every (seed, step, index), as in ``reference``."""
    return -tl.log2(exponential(random_bits(seed, step, index)))


@triton.jit
def random_bits(seed, step, index):
    """32 random bits for every (seed, step, index), as in ``reference_sampling.random_bits``."""
    low = seed.to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    step = step.to(tl.uint32)
    key0 = _lowbias32(_lowbias32(_lowbias32(low, 0) + high, 0) + step, 0)
    key1 = _lowbias32(_lowbias32(_lowbias32(step ^ 0x9E3779B9, 0) + low, 0) + high, 0)
    return _lowbias32(index.to(tl.uint32) + key0, key1)


@triton.jit
def exponential(bits):
    """See ``reference_sampling.exponential``."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * (2.0**-32), 1 - 2.0**-24)
    series = u * (1 + u * (1 / 2 + u * (1 / 3)))
    return tl.where(u < 1 / 64, series, -tl.log(1 - u))


@triton.jit
def _lowbias32(x, key):
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D + key
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
