"""Top-k and top-p: which tokens the threshold leaves, by the kernels and by their reference."""

import pytest
import torch

from nanovllm.kernels import reference_sampling, top_k_top_p
from tests.kernels.cases import DEVICE, check_threshold, threshold_case, within

FORMS = {"reference": reference_sampling.find_threshold, "kernels": top_k_top_p.find_threshold}
EACH_FORM = pytest.mark.parametrize("find_threshold", FORMS.values(), ids=FORMS)
LIMITS = pytest.mark.parametrize("limits", ["k", "p", "kp"])


@pytest.fixture
def small_tiles(monkeypatch):
    """Few logits then cross every border: of tiles, of buckets, and of what is listed at once."""
    small = {"TILE": 512, "BUCKET": 8, "FEW": 4, "SHORTLIST": 64, "_CHUNK": 128}
    for name, value in small.items():
        monkeypatch.setattr(top_k_top_p, name, value)


@EACH_FORM
@LIMITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab", "spread"), [(50, 3.0), (600, 3.0), (1100, 0.3)])
def test_threshold(poison, small_tiles, find_threshold, vocab, spread, dtype, limits):
    """In 16 bits many of the logits are equal."""
    case = threshold_case(6, vocab, dtype, limits, spread)
    check_threshold(find_threshold(*case), *case)


def test_threshold_in_tiles_of_their_real_size(poison):
    case = threshold_case(6, 17000, torch.bfloat16, "kp")
    check_threshold(top_k_top_p.find_threshold(*case), *case)


@EACH_FORM
@LIMITS
def test_threshold_of_odd_rows(poison, small_tiles, find_threshold, limits):
    logits, *rest = threshold_case(11, 600, torch.float32, limits)
    logits[0], logits[1], logits[2, 5:] = 1.5, float("-inf"), float("-inf")
    logits[3, ::2], logits[4, ::3] = float("nan"), -3.4e38
    logits[5] = logits[5].round()
    logits[6, torch.randperm(600)[:300]] = float("-inf")
    logits[7], logits[7, 500:] = 0.0, -0.0
    logits[8] *= 1e6
    logits[9] = torch.finfo(torch.float32).min
    check_threshold(find_threshold(logits, *rest), logits, *rest)


@EACH_FORM
@LIMITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threshold_among_logits_around_zero(poison, small_tiles, find_threshold, dtype, limits):
    """Most keys of floats are near 0, so passes that divide the keys leave more than one."""
    logits, *rest = threshold_case(8, 600, dtype, limits)
    logits[::2] *= 1e-30
    logits[1::4, ::2] *= 1e-20
    check_threshold(find_threshold(logits, *rest), logits, *rest)


@LIMITS
def test_kernels_keep_what_the_reference_keeps(poison, small_tiles, limits):
    """Probabilities so far apart that no rounding decides."""
    logits, temperatures, rows, top_k, top_p = threshold_case(6, 600, torch.float32, limits)
    logits = torch.argsort(logits, dim=-1).argsort(-1).float() * 0.7
    if top_p is not None:
        top_p[:] = torch.tensor([0.3, 0.62, 0.97, 1.0, 1e-9], device=DEVICE)
    temperatures[:] = 1.0
    case = logits, temperatures, rows, top_k, top_p
    kept, expected = (
        within(logits, f(*case))
        for f in (top_k_top_p.find_threshold, reference_sampling.find_threshold)
    )
    assert torch.equal(kept, expected)


@LIMITS
def test_a_threshold_depends_on_its_own_row_only(poison, small_tiles, limits):
    logits, temperatures, rows, top_k, top_p = threshold_case(7, 600, torch.bfloat16, limits)
    together = top_k_top_p.find_threshold(logits, temperatures, rows, top_k, top_p)
    for n in range(6):
        one = [None if x is None else x[n : n + 1] for x in (top_k, top_p)]
        alone = top_k_top_p.find_threshold(logits, temperatures, rows[n : n + 1], *one)
        assert [x[n] for x in alone] == [x[n] for x in together]


@EACH_FORM
@pytest.mark.parametrize("limits", ["p", "kp"])
def test_of_equal_tokens_as_many_stay_as_make_up_p(poison, small_tiles, find_threshold, limits):
    """Not one more, where p of them is a whole number."""
    shares = {20: 0.5, 65: 0.2, 100: 0.99, 200: 0.05, 600: 0.1}
    logits = torch.full((len(shares), 700), 1.5, device=DEVICE)
    if limits == "p":
        for row, count in zip(logits, shares, strict=True):
            row[torch.randperm(700)[count:]] = float("-inf")
    rows = torch.arange(len(shares), device=DEVICE)
    top_k = torch.tensor([*shares], device=DEVICE) if limits == "kp" else None
    top_p = torch.tensor([*shares.values()], device=DEVICE)
    case = logits, torch.full((len(shares),), 0.7, device=DEVICE), rows, top_k, top_p
    stay = within(logits, find_threshold(*case))
    assert stay.sum(1).tolist() == [10, 13, 99, 10, 60]
