"""The references of paged attention against torch's own attention."""

from __future__ import annotations

from nanovllm.kernels import reference
from tests.kernels.cases import close
from tests.kernels.paged_case import PagedCase


def test_attention_references_are_dense_attention():
    case = PagedCase([1, 37, 16], 6, 2, 32, 16)
    close(reference.paged_decode_attention(*case.cache(), case.lens, case.scale), case.dense())
    case = PagedCase([1, 37, 16], 6, 2, 32, 16, [1, 20, 16])
    close(case.prefill(reference), case.dense())
