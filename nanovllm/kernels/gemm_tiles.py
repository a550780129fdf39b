"""What the partition's matrix product does with one tile: load its steps, finish it, or join it.

A tile of the product is ``[BLOCK_M, BLOCK_N]`` in float32, for BLOCK_N rows of the weight: those of
as many features, or for the gated product of half as many features in each half of the weight.
With TMA, ``x``, ``weight`` and ``out`` are tensor descriptors, and rows and columns outside the
matrices load as 0 and are not stored; without, they are pointers.
"""

import triton
import triton.language as tl


@triton.jit
def load_x(
    x, m, step, rows, inner, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):
    """``[BLOCK_M, BLOCK_K]``: a step of the m-th band of rows."""
    if TMA:
        return x.load([m * BLOCK_M, step * BLOCK_K])
    else:
        row = tl.minimum(m * BLOCK_M + tl.arange(0, BLOCK_M), rows - 1)
        return _load_rows(x, row, step, inner, BLOCK_K)


@triton.jit
def load_weight(
    weight, n, step, features, inner,
    WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_N, BLOCK_K]``: WIDTH features, or WIDTH of the gate and the same of the up half."""
    if TMA and WIDTH < BLOCK_N:
        return weight.load([0, n * WIDTH, step * BLOCK_K]).reshape([BLOCK_N, BLOCK_K])
    elif TMA:
        return weight.load([n * WIDTH, step * BLOCK_K])
    else:
        index = tl.arange(0, BLOCK_N)
        feature = tl.minimum(n * WIDTH + index % WIDTH, features - 1)
        return _load_rows(weight, feature + index // WIDTH * features, step, inner, BLOCK_K)


@triton.jit
def _load_rows(matrix, row, step, inner, BLOCK_K: tl.constexpr):
    column = step * BLOCK_K + tl.arange(0, BLOCK_K)
    place = matrix + row.to(tl.int64)[:, None] * inner + column[None, :]
    return tl.load(place, mask=(column < inner)[None, :], other=0.0)


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    split = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(split, [0, 2, 1]))


@triton.jit
def finish(
    out, bias, low, high, m, n, rows, features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GATED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write a tile's output, given the left and the right half of its sum."""
    HALF: tl.constexpr = BLOCK_N // 2
    if GATED:
        result = low * tl.sigmoid(low) * high
        _store(out, bias, result, m * BLOCK_M, n * HALF, rows, features, BLOCK_M, HALF, TMA)
    else:
        column = n * BLOCK_N
        _store(out, bias, low, m * BLOCK_M, column, rows, features, BLOCK_M, HALF, TMA)
        _store(out, bias, high, m * BLOCK_M, column + HALF, rows, features, BLOCK_M, HALF, TMA)


@triton.jit
def _store(
    out, bias, result, first_row, first_column, rows, features,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write ``result [ROWS, COLUMNS]`` plus the bias, as far as it is inside the output."""
    column = first_column + tl.arange(0, COLUMNS)
    if bias is not None:
        added = tl.load(bias + column, mask=column < features, other=0.0)
        result += added.to(tl.float32)[None, :]
    if TMA:
        out.store([first_row, first_column], result.to(out.dtype))
    else:
        row = first_row + tl.arange(0, ROWS)
        place = out + row.to(tl.int64)[:, None] * features + column[None, :]
        wanted = (row < rows)[:, None] & (column < features)[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def store_partial(partials, acc, begins_here, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keep a cut tile's sum so far in the program's slot 1 if the tile begins here, else 0."""
    # In quarters: a change of layout takes shared memory for all of what is stored at once.
    QUARTER: tl.constexpr = BLOCK_N // 4
    slot = (2 * tl.program_id(0) + begins_here.to(tl.int32)).to(tl.int64)
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, QUARTER)
    place = partials + slot * (BLOCK_M * BLOCK_N) + row[:, None] * BLOCK_N + column[None, :]
    low, high = halves(acc)
    first, second = halves(low)
    third, fourth = halves(high)
    # NOTE: not by TMA, whose stores the barrier before the announcement does not wait for.
    tl.store(place, first)
    tl.store(place + QUARTER, second)
    tl.store(place + 2 * QUARTER, third)
    tl.store(place + 3 * QUARTER, fourth)


@triton.jit
def join_partials(partials, begins_in, ends_in, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The two halves of a tile's sum over the shares that it is cut into, in their order."""
    HALF: tl.constexpr = BLOCK_N // 2
    row, column = tl.arange(0, BLOCK_M), tl.arange(0, HALF)
    place = partials + row[:, None] * BLOCK_N + column[None, :]
    low = tl.zeros([BLOCK_M, HALF], tl.float32)
    high = tl.zeros([BLOCK_M, HALF], tl.float32)
    for share in range(begins_in, ends_in + 1):
        slot = (2 * share + (share == begins_in).to(tl.int32)).to(tl.int64)
        part = place + slot * (BLOCK_M * BLOCK_N)
        # NOTE: from L2 (".cg"), where the other programs' stores are; L1 may hold older values.
        low += tl.load(part, cache_modifier=".cg")
        high += tl.load(part + HALF, cache_modifier=".cg")
    return low, high
