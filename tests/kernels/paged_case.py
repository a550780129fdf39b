"""Attention over a paged cache: random sequences, and the tunings of decode to try them with."""

import importlib.util
from dataclasses import replace

import numpy as np
import torch

from nanovllm.kernels import paged_decode
from tests.kernels.cases import CUDA, DEVICE
from tests.paged_sequences import PagedSequences

HOPPER = CUDA and torch.cuda.get_device_capability() >= (9, 0)
TUNINGS = {"plain": paged_decode.PLAIN}
if importlib.util.find_spec("triton.tools.tensor_descriptor") and (HOPPER or not CUDA):
    TUNINGS |= {"tma": paged_decode.TMA, "keys_first": paged_decode.KEYS_FIRST}


class PagedCase(PagedSequences):
    """Sequences for the kernels, none of which may follow a table past a sequence's last block."""

    def __init__(self, *args, **options):
        super().__init__(*args, device=DEVICE, **options)

    def decode(self, num_sms, tuning=None, out=None, **changes):
        tuning = replace(tuning or paged_decode.PLAIN, **changes)
        heads, kv_heads, dim = self.q.shape[1], self.k_cache.shape[1], self.q.shape[2]
        workspace = paged_decode.DecodeWorkspace(num_sms, heads, kv_heads, dim, DEVICE, tuning)
        return self.decode_in(workspace, out=out)

    def decode_in(self, workspace, count=None, out=None):
        """`count`: sequences that are no padding."""
        tiles = paged_decode.tile_offsets(np.array(self.context_lens))
        if count is not None:
            tiles[count:] = tiles[count]
        return paged_decode.paged_decode_attention(
            *self.cache(), self.lens, self.scale, torch.from_numpy(tiles).to(DEVICE), workspace, out
        )

    def prefill(self, module, *out):
        return module.paged_prefill_attention(
            *self.cache(), self.cu_seqlens, self.lens, max(self.query_lens), self.scale, *out
        )
