"""Attention over a paged cache: random sequences, and the tunings of decode to try them with."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.kernels import paged_decode, reference
from tests.kernels.cases import CUDA, DEVICE, randn

HOPPER = CUDA and torch.cuda.get_device_capability() >= (9, 0)
TUNINGS = {"plain": paged_decode.PLAIN}
if importlib.util.find_spec("triton.tools.tensor_descriptor") and (HOPPER or not CUDA):
    TUNINGS |= {"tma": paged_decode.TMA, "keys_first": paged_decode.KEYS_FIRST}


class PagedCase:
    """Random sequences in a paged cache; unused slots, all of block 0 too, hold ``stale``."""

    def __init__(
        self,
        context_lens,
        hq,
        hkv,
        dim,
        block_size,
        query_lens=None,
        dtype=torch.float32,
        stale=float("nan"),
    ):
        self.context_lens, self.scale = context_lens, dim**-0.5
        needed = [-(-length // block_size) for length in context_lens]
        blocks = torch.randperm(sum(needed) + 2, device=DEVICE).to(torch.int32) + 1
        shape = (sum(needed) + 3, hkv, block_size, dim)
        self.k_cache, self.v_cache = (
            torch.full(shape, stale, dtype=dtype, device=DEVICE) for _ in "kv"
        )
        # Entries past a sequence's last block are out of range: no kernel may follow them.
        self.tables = torch.full(
            (len(needed), max(needed) + 1), 2**30, dtype=torch.int32, device=DEVICE
        )
        self.keys, self.values = [], []
        used = 0
        for n, (length, count) in enumerate(zip(context_lens, needed, strict=True)):
            self.tables[n, :count] = blocks[used : used + count]
            used += count
            token = torch.arange(length, device=DEVICE)
            slots = self.tables[n].long()[token // block_size] * block_size + token % block_size
            k, v = randn(length, hkv, dim, dtype=dtype), randn(length, hkv, dim, dtype=dtype)
            reference.store_kv(k, v, self.k_cache, self.v_cache, slots)
            self.keys.append(k)
            self.values.append(v)
        self.query_lens = query_lens or [1] * len(needed)
        self.q = randn(sum(self.query_lens), hq, dim, dtype=dtype)
        self.lens = torch.tensor(context_lens, dtype=torch.int32, device=DEVICE)
        starts = np.cumsum([0, *self.query_lens])
        self.cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=DEVICE)

    def cache(self):
        return self.q, self.k_cache, self.v_cache, self.tables

    def dense(self):
        """The answer by torch's own attention, sequence by sequence."""
        out = []
        for q, k, v in zip(self.q.split(self.query_lens), self.keys, self.values, strict=True):
            q, k, v = (x.float().transpose(0, 1)[None] for x in (q, k, v))
            visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=DEVICE)
            out.append(
                F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=visible.tril(k.shape[2] - q.shape[2]),
                    scale=self.scale,
                    enable_gqa=True,
                )[0].transpose(0, 1)
            )
        return torch.cat(out).to(self.q.dtype)

    def decode(self, num_sms, tuning=None, out=None, **changes):
        tuning = replace(tuning or paged_decode.PLAIN, **changes)
        heads, kv_heads, dim = self.q.shape[1], self.k_cache.shape[1], self.q.shape[2]
        workspace = paged_decode.DecodeWorkspace(num_sms, heads, kv_heads, dim, DEVICE, tuning)
        offsets = paged_decode.tile_offsets(np.array(self.context_lens))
        return paged_decode.paged_decode_attention(
            *self.cache(),
            self.lens,
            self.scale,
            torch.from_numpy(offsets).to(DEVICE),
            workspace,
            out,
        )

    def prefill(self, module, *out):
        return module.paged_prefill_attention(
            *self.cache(), self.cu_seqlens, self.lens, max(self.query_lens), self.scale, *out
        )
