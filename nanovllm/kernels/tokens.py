"""Input ids of a decode step, some of which only the device knows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def resolve_tokens(input_ids: Tensor, last_tokens: Tensor) -> Tensor:
    """See ``reference.resolve_tokens``."""
    count = input_ids.shape[0]
    out = torch.empty(count, dtype=torch.int64, device=input_ids.device)
    _resolve_kernel[(triton.cdiv(count, BLOCK),)](input_ids, last_tokens, out, count, BLOCK=BLOCK)
    return out


@triton.jit(do_not_specialize=["input_ids", "count"])
def _resolve_kernel(input_ids, last_tokens, out, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(input_ids + index, mask=index < count, other=0).to(tl.int64)
    pending = given < 0
    drawn = tl.load(last_tokens - 1 - given, mask=pending & (index < count), other=0)
    tl.store(out + index, tl.maximum(tl.where(pending, drawn, given), 0), mask=index < count)
