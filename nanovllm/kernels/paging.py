"""Where cached tokens lie: the address arithmetic that the kernels share.

A loop over tiles carries the block that holds the next tile, looked up one step ahead: Triton's
pipeliner would pay for a chain of loads within a step with half of its stages.
"""

import triton
import triton.language as tl


@triton.jit
def block_of(block_table, start, BLOCK_SIZE: tl.constexpr):
    """The block that holds token ``start`` of a sequence."""
    # NOTE: int64 before multiplying: a layer's cache can exceed 2^31 elements.
    return tl.load(block_table + start // BLOCK_SIZE).to(tl.int64)


@triton.jit
def tile_rows(
    block_table, block, start, head, context_len,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Rows, in the cache seen as ``[num_blocks * Hkv * block_size, D]``, of tokens start + 0..TILE.

    A row is ``base`` (a scalar int64) plus one of ``offsets [TILE]``. A tile inside ``block``,
    which is ``block_of(start)``, has offsets 0..TILE; one that straddles blocks looks all up.
    """
    if BLOCK_SIZE % TILE == 0:
        base = (block * KV_HEADS + head) * BLOCK_SIZE + start % BLOCK_SIZE
        offsets = tl.arange(0, TILE)
    else:
        token = start + tl.arange(0, TILE)
        entry = block_table + token // BLOCK_SIZE
        blocks = tl.load(entry, mask=token < context_len, other=0).to(tl.int64)
        base = (head * BLOCK_SIZE).to(tl.int64)
        offsets = blocks * (KV_HEADS * BLOCK_SIZE) + token % BLOCK_SIZE
    return base, offsets


@triton.jit
def row_of_slot(slot, head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Row of a token's KV head, in the same view of the cache, as int64."""
    slot = slot.to(tl.int64)
    return (slot // BLOCK_SIZE * KV_HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
