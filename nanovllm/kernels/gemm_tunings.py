"""Which tilings of the partition's matrix product are worth timing for a shape and an SM count.

A product ``x [N, K] @ weight [M, K].T`` is cut into tiles of the output. On a partition of P SMs
the last round of tiles leaves SMs idle unless the tiles divide evenly, so what matters is
``rounds * time of a tile``, and that is what ``candidates`` ranks by. The model knows neither
the caches nor the clocks: it leaves out what cannot win, and a timer picks among the rest.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class GemmTuning:
    """How ``partition_gemm`` is compiled and spread over the SMs.

    Args:
        block_m: rows of x in a tile.
        block_n: rows of the weight in a tile; in the gated product one half are of each half.
        block_k: inner elements of a step.
        num_warps: warps of a program.
        num_stages: steps in shared memory at a time.
        group: bands of rows that neighbouring tiles take turns in, so that they share weights.
        stream_k: divide the steps of the last tiles equally among all programs.
        tma: load and store tiles with the bulk copy engine (Hopper).
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    stream_k: bool = False
    tma: bool = True


# Compiled for sm_90 by Triton 3.6 these spill no register, divided or not, gated or not.
_HOPPER = (
    GemmTuning(128, 256, 64, num_warps=8, num_stages=3),
    GemmTuning(128, 128, 64, num_warps=8, num_stages=4),
    GemmTuning(128, 128, 128, num_warps=8, num_stages=3),
    GemmTuning(128, 64, 128, num_warps=4, num_stages=4),
    GemmTuning(64, 256, 64, num_warps=4, num_stages=4),
    GemmTuning(64, 128, 128, num_warps=4, num_stages=4),
    GemmTuning(64, 64, 128, num_warps=4, num_stages=6),
)
_PLAIN = (
    GemmTuning(128, 128, 64, num_warps=8, num_stages=3, tma=False),
    GemmTuning(64, 128, 64, num_warps=4, num_stages=4, tma=False),
    GemmTuning(64, 64, 64, num_warps=4, num_stages=4, tma=False),
)
_FLOAT32 = (
    GemmTuning(64, 64, 32, num_warps=4, num_stages=3, tma=False),
    GemmTuning(32, 64, 32, num_warps=4, num_stages=3, tma=False),
)

# Of an H200's SM at 1.98 GHz, dense bf16; rounded.
_FLOPS_PER_US = 7e6
_L2_BYTES_PER_US = 8e4
_ROUND_US = 1.0  # begin and end of a tile
_JOIN_BYTES_PER_US = 1e5


def candidates(
    rows: int,
    features: int,
    inner: int,
    num_sms: int,
    *,
    element_size: int = 2,
    hopper: bool = True,
    limit: int = 12,
) -> list[GemmTuning]:
    """The tunings to time for ``x [rows, inner] @ weight [features, inner].T``, best guess first.

    Args:
        rows: N.
        features: M, rows of the weight; of both halves in the gated product.
        inner: K.
        num_sms: SMs of the partition.
        element_size: bytes of an element, 2 or 4.
        hopper: whether the GPU copies tiles in bulk (compute capability 9).
        limit: at most so many.

    Raises:
        ValueError: a size is under 1.
    """
    sizes = {"rows": rows, "features": features, "inner": inner, "num_sms": num_sms, "limit": limit}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    half_precision = _HOPPER if hopper else _PLAIN
    tilings = _FLOAT32 if element_size == 4 else half_precision
    tunings = []
    for tiling in tilings:
        tunings.append(tiling)
        tiles = _tiles(rows, features, tiling)
        if tiles % num_sms:  # else there is no last round to divide
            tunings.append(replace(tiling, stream_k=True))
    tunings.sort(key=lambda t: predicted_us(rows, features, inner, num_sms, t, element_size))
    return tunings[:limit]


def predicted_us(
    rows: int, features: int, inner: int, num_sms: int, tuning: GemmTuning, element_size: int = 2
) -> float:
    """A guess at the kernel's time in us, good for ranking tunings of one shape."""
    tiles = _tiles(rows, features, tuning)
    area = tuning.block_m * tuning.block_n
    flops = 2 * area * inner
    read = (tuning.block_m + tuning.block_n) * inner * element_size
    tile_us = max(flops / _FLOPS_PER_US, read / _L2_BYTES_PER_US)
    cut = tiles_to_cut(tiles, num_sms) if tuning.stream_k else 0
    rounds = -(-(tiles - cut) // num_sms)
    whole_us = rounds * (tile_us + _ROUND_US)
    if not cut:
        return whole_us
    # A program writes two partial results, and reads those of a tile that it joins.
    pieces = 1 + num_sms / cut
    join_us = (2 + pieces) * area * 4 / _JOIN_BYTES_PER_US
    return whole_us + cut / num_sms * tile_us + _ROUND_US + join_us


def tiles_to_cut(tiles: int, programs: int) -> int:
    """How many of the last tiles stream-K divides among all programs.

    Those of the last round, unless they are so few that each would be cut into many pieces, which
    one program has to join; then those of the last two rounds, into two or three pieces each.
    """
    cut = tiles % programs
    return cut + programs if 0 < 2 * cut < programs < tiles else cut


def _tiles(rows: int, features: int, tuning: GemmTuning) -> int:
    return -(-rows // tuning.block_m) * -(-features // tuning.block_n)
