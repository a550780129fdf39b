"""Top-k and top-p: which tokens the cut leaves, by the kernel and by its reference."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import likely, reference, top_k_top_p
from tests.kernels.cases import DEVICE, check_cut, cut_case, within

FORMS = {"likely": likely.find_cut, "top_k_top_p": top_k_top_p.find_threshold}
KERNELS = pytest.mark.parametrize("find_cut", FORMS.values(), ids=FORMS)
CUTS = pytest.mark.parametrize(
    "find_cut", [reference.find_cut, *FORMS.values()], ids=["reference", *FORMS]
)
LIMITS = pytest.mark.parametrize("limits", ["k", "p", "kp"])


@CUTS
@LIMITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "spread"), [(50, 3.0), (9000, 3.0), (17000, 0.3)])
def test_cut(poison, find_cut, vocab, spread, dtype, limits):
    """In 16 bits many of the logits are equal."""
    case = cut_case(8, vocab, dtype, limits, spread)
    check_cut(find_cut(*case), *case)


@CUTS
@LIMITS
def test_cut_of_odd_rows(poison, find_cut, limits):
    logits, *rest = cut_case(12, 9000, torch.float32, limits)
    logits[0], logits[1], logits[2, 5:] = 1.5, float("-inf"), float("-inf")
    logits[3, ::2], logits[4, ::3] = float("nan"), -3.4e38
    logits[5] = logits[5].round()
    logits[6, torch.randperm(9000)[:5000]] = float("-inf")
    logits[7], logits[7, 8000:] = 0.0, -0.0
    logits[8] *= 1e6
    check_cut(find_cut(logits, *rest), logits, *rest)


@KERNELS
@LIMITS
def test_cuts_agree_with_sorting(poison, find_cut, limits):
    """Probabilities so far apart that no rounding decides."""
    logits, temperatures, rows, top_k, top_p = cut_case(6, 5000, torch.float32, limits)
    logits = torch.argsort(logits, dim=-1).argsort(-1).float() * 0.7
    if top_p is not None:
        top_p[:] = torch.tensor([0.3, 0.62, 0.97, 1.0, 1e-9], device=DEVICE)
    temperatures[:] = 1.0
    everything, certain = torch.full_like(rows, 5000), temperatures.new_ones(len(rows))
    kept = reference.keep_likely(
        logits[rows],
        temperatures[rows],
        everything if top_k is None else top_k,
        certain if top_p is None else top_p,
    )
    cut = find_cut(logits, temperatures, rows, top_k, top_p)
    assert torch.equal(within(logits, cut)[rows], kept > float("-inf"))


@KERNELS
@LIMITS
def test_a_cut_depends_on_its_own_row_only(poison, find_cut, limits):
    logits, temperatures, rows, top_k, top_p = cut_case(7, 9000, torch.bfloat16, limits)
    together = find_cut(logits, temperatures, rows, top_k, top_p)
    for n in range(6):
        one = [None if x is None else x[n : n + 1] for x in (top_k, top_p)]
        alone = find_cut(logits, temperatures, rows[n : n + 1], *one)
        assert [x[n] for x in alone] == [x[n] for x in together]


def test_as_many_passes_as_any_row_may_need():
    """3 and 4 bits a pass of 16, 19 and 32 bits."""
    assert [likely.num_passes(shift) for shift in (16, 13, 0)] == [6, 7, 11]
    assert [top_k_top_p.num_passes(shift) for shift in (16, 13, 0)] == [4, 5, 8]
