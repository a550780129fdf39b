"""Random sequences in a paged KV cache, and their attention by torch's own. Needs no Triton."""

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.kernels import reference


class PagedSequences:
    """`context_lens` cached tokens each, of which the last `query_lens` (default: 1) are queries.

    Unused slots, and all of block 0, hold `stale`; entries of a block table past a sequence's last
    block are `unused`.
    """

    def __init__(
        self, context_lens, hq, hkv, dim, block_size, query_lens=None, *,
        device, dtype=torch.float32, stale=float("nan"), unused=2**30,
    ):  # fmt: skip
        self.context_lens, self.scale = context_lens, dim**-0.5
        self.query_lens = query_lens or [1] * len(context_lens)
        needed = [-(-length // block_size) for length in context_lens]
        blocks = torch.randperm(sum(needed) + 2, device=device).to(torch.int32) + 1
        shape = (sum(needed) + 3, hkv, block_size, dim)
        self.k_cache, self.v_cache = (
            torch.full(shape, stale, dtype=dtype, device=device) for _ in "kv"
        )
        self.tables = torch.full(
            (len(needed), max(needed) + 1), unused, dtype=torch.int32, device=device
        )
        self.keys, self.values, slots_of_queries = [], [], []
        used = 0
        for n, (length, count) in enumerate(zip(context_lens, needed, strict=True)):
            self.tables[n, :count] = blocks[used : used + count]
            used += count
            token = torch.arange(length, device=device)
            slots = self.tables[n].long()[token // block_size] * block_size + token % block_size
            k, v = (torch.randn(length, hkv, dim, device=device).to(dtype) for _ in "kv")
            reference.store_kv(k, v, self.k_cache, self.v_cache, slots)
            self.keys.append(k)
            self.values.append(v)
            slots_of_queries.append(slots[length - self.query_lens[n] :])
        self.slots = torch.cat(slots_of_queries).to(torch.int32)
        self.q = torch.randn(sum(self.query_lens), hq, dim, device=device).to(dtype)
        self.lens = torch.tensor(context_lens, dtype=torch.int32, device=device)
        starts = np.cumsum([0, *self.query_lens])
        self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)

    def cache(self):
        return self.q, self.k_cache, self.v_cache, self.tables

    def dense(self):
        """The answer, sequence by sequence."""
        parts = zip(self.q.split(self.query_lens), self.keys, self.values, strict=True)
        return torch.cat([dense_attention(q, k, v, self.scale) for q, k, v in parts])


def dense_attention(q, k, v, scale):
    """Of one sequence, causal: `q [Lq, Hq, D]` are its last tokens, `k, v [Lk, Hkv, D]` all."""
    visible = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    out = F.scaled_dot_product_attention(
        *(x.float().transpose(0, 1)[None] for x in (q, k, v)),
        attn_mask=visible,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1).to(q.dtype)
