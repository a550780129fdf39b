"""A decode step's own token inside the decode kernel: its queries, its key and its value.

What ``rope.py`` does in a launch of its own (RMS norm of each head, rotary embedding, copies to the
cache), done in registers by the programs of ``paged_decode.py``. Query, key and value are rounded
as they are there, so that attention is the same to rounding.
"""

import triton
import triton.language as tl


@triton.jit
def begin_item(
    qkv, q_weight, k_weight, eps, cos_sin, k_slot, v_slot, scale_log2, head, owns_new,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The queries of a (sequence, KV head) pair, and the softmax over its new token or nothing.

    Args:
        qkv: pointer to the sequence's row of the projection.
        q_weight, k_weight: pointers to the ``[D]`` of the norms.
        cos_sin: pointer to the row of the new token's position: cosines, then sines.
        k_slot, v_slot: pointers to the new token's place in the caches.
        owns_new: whether this program stores the new key and value and counts them in.

    Returns:
        The queries ``[GROUP_PAD, D]`` in qkv's dtype, 0 past GROUP, and the state of the online
        softmax: peak ``[GROUP_PAD]``, weight ``[GROUP_PAD, TILE]`` and accumulator
        ``[GROUP_PAD, D]``.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    member = tl.arange(0, GROUP_PAD)[:, None]
    # Everything is loaded in the shape of the queries, the one key too, and all of it before the
    # first use. So no value moves between threads and the latencies overlap.
    column = tl.broadcast_to(tl.arange(0, HEAD_DIM)[None, :], [GROUP_PAD, HEAD_DIM])
    pair = (column + HALF) % HEAD_DIM  # what the rotation combines it with
    q_heads = qkv + (head * GROUP + member) * HEAD_DIM
    k_head = qkv + (KV_HEADS * GROUP + head) * HEAD_DIM
    query = tl.load(q_heads + column, mask=member < GROUP, other=0.0)
    query_pair = tl.load(q_heads + pair, mask=member < GROUP, other=0.0)
    key, key_pair = tl.load(k_head + column), tl.load(k_head + pair)
    value = tl.load(k_head + KV_HEADS * HEAD_DIM + column)
    cos = tl.load(cos_sin + column % HALF)
    sin = tl.load(cos_sin + HALF + column % HALF)
    q_norm, q_norm_pair = tl.load(q_weight + column), tl.load(q_weight + pair)
    k_norm, k_norm_pair = tl.load(k_weight + column), tl.load(k_weight + pair)

    sin = tl.where(column < HALF, -sin, sin)
    query = _norm_rope(query, query_pair, q_norm, q_norm_pair, eps, cos, sin)
    key = _norm_rope(key, key_pair, k_norm, k_norm_pair, eps, cos, sin)
    stores = member < owns_new.to(tl.int32)  # the first of the equal rows, or none
    tl.store(k_slot + column, key, mask=stores)
    tl.store(v_slot + column, value, mask=stores)

    score = tl.sum(query.to(tl.float32) * key.to(tl.float32), axis=1) * scale_log2
    peak = tl.where(owns_new, score, float("-inf"))
    counted = owns_new & (tl.arange(0, TILE) == 0)[None, :]
    weight = tl.broadcast_to(tl.where(counted, 1.0, 0.0), [GROUP_PAD, TILE])
    return query, peak, weight, tl.where(owns_new, value.to(tl.float32), 0.0)


@triton.jit
def _norm_rope(x, pair, weight, pair_weight, eps, cos, sin):
    """RMS norm and rotation of heads ``x [G, D]``, in their dtype.

    ``pair`` holds for each element the one that it is rotated with, and ``sin`` has its sign.
    """
    x32 = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x32 * x32, axis=1) / x.shape[1] + eps)[:, None]
    x32 = x32 * inverse * weight.to(tl.float32)
    pair32 = pair.to(tl.float32) * inverse * pair_weight.to(tl.float32)
    return (x32 * cos + pair32 * sin).to(x.dtype)
