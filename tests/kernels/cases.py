"""What several kernel tests share: the device, tolerances and random inputs. Needs no Triton."""

import os
import random

import torch

from nanovllm.kernels.normed import HeadInputs
from tests.close_draws import CLOSE, TIMES

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# Triton's interpreter truncates to bfloat16 where the GPU rounds, and has no bfloat16 dot.
HALF = [torch.float16, *([torch.bfloat16] if CUDA else [])]
EPS = 1e-6
# Sums in float32, in another order: a token whose cumulative probability is this close to top_p
# may stay or go.
BORDER = 1e-6


def new_seed() -> int:
    """Fresh random inputs in every run; the seed is printed when a test fails."""
    value = int(os.environ.get("NANOVLLM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"NANOVLLM_TEST_SEED={value}")
    torch.manual_seed(value)
    random.seed(value)
    return value


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(actual, expected, dtype=torch.float32):
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def rope_case(num_tokens, hq, hkv, dim, block_size, dtype=torch.float32, normed=True):
    """Arguments of ``qk_norm_rope_store``; ``normed``: whether the heads have norms."""
    angles = torch.outer(torch.arange(50), 10000.0 ** -(torch.arange(0, dim, 2) / dim))
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1).to(DEVICE)
    shape = (num_tokens // block_size + 3, hkv, block_size, dim)
    caches = [torch.full(shape, float("nan"), dtype=dtype, device=DEVICE) for _ in "kv"]
    return {
        "qkv": randn(num_tokens, (hq + 2 * hkv) * dim, dtype=dtype) * 2,
        "q_weight": randn(dim, dtype=dtype) if normed else None,
        "k_weight": randn(dim, dtype=dtype) if normed else None,
        "eps": EPS,
        "cos_sin": cos_sin,
        "positions": torch.randint(0, 50, (num_tokens,), device=DEVICE),
        "slot_mapping": torch.randperm(shape[0] * block_size, device=DEVICE)[:num_tokens],
        "k_cache": caches[0],
        "v_cache": caches[1],
        "num_q_heads": hq,
        "num_kv_heads": hkv,
    }


def head_arguments(case):
    """The arguments of ``qk_norm_rope_store`` as it takes them."""
    return case["qkv"], HeadInputs(**{k: v for k, v in case.items() if k != "qkv"})


def with_caches_of_its_own(case):
    """The same arguments, but what is stored goes elsewhere."""
    return case | {name: case[name].clone() for name in ("k_cache", "v_cache")}


def check_caches(case, expected, dtype=torch.float32):
    """The caches hold the same, and NaN where nothing was stored."""
    for name in ("k_cache", "v_cache"):
        assert torch.equal(case[name].isnan(), expected[name].isnan())
        close(case[name].nan_to_num(), expected[name].nan_to_num(), dtype)


def sampling_case(rows, vocab, dtype=torch.float32):
    temperatures = torch.rand(rows, device=DEVICE) + 0.2
    temperatures[::3] = 0
    seeds = torch.randint(-(2**62), 2**62, (rows,), device=DEVICE)
    steps = torch.randint(0, 5000, (rows,), device=DEVICE)
    return randn(rows, vocab, dtype=dtype) * 3, temperatures, seeds, steps


def decided(draw, case):
    """Rows of which no last bit of a logit decides what is drawn; greedy ones are, ties and all."""
    (logits, temperatures, *rest), tokens = case, draw(*case)
    nearby = [logits.float() + CLOSE * randn(*logits.shape) for _ in range(TIMES)]
    same = [draw(each, temperatures, *rest) == tokens for each in nearby]
    rows = torch.stack(same).all(0) | (temperatures == 0)
    assert rows.float().mean() > 0.5
    return rows


def threshold_case(rows, vocab, dtype, limits, spread=3.0):
    """Arguments of ``find_threshold``; all rows but the last are filtered."""
    logits = (randn(rows, vocab) * spread).to(dtype)
    temperatures = torch.rand(rows, device=DEVICE) * 1.5 + 0.1
    top_k = torch.randint(1, vocab + 3, (rows - 1,), device=DEVICE)
    few = torch.tensor([1, 20, vocab], device=DEVICE)
    top_k[:3] = few
    top_p = torch.rand(rows - 1, device=DEVICE)
    top_p[1:5] = torch.tensor([0.9, 1e-6, 1.0, 0.999], device=DEVICE)
    ids = torch.arange(rows - 1, device=DEVICE)
    return (
        logits,
        temperatures,
        ids,
        top_k if "k" in limits else None,
        top_p if "p" in limits else None,
    )


def within(logits, threshold):
    """Which tokens of each row stay."""
    least, tie_end = (x[:, None] for x in threshold)
    among = torch.arange(logits.shape[1], device=logits.device) <= tie_end
    return ((logits > least) | ((logits == least) & among)) & (logits > float("-inf"))


def check_threshold(threshold, logits, temperatures, rows, top_k, top_p, border=BORDER):
    """That what stays is right by sorting, but for what lies at the border of top_p."""
    stay = within(logits, threshold)
    for item, row in enumerate(rows.tolist()):
        values = torch.where(logits[row].isnan(), float("-inf"), logits[row].double())
        ordered, order = values.sort(descending=True, stable=True)
        limit = len(values) if top_k is None else int(top_k[item])
        limit = min(limit, int((ordered > float("-inf")).sum()))
        count = int(stay[row].sum())
        assert count <= limit
        assert stay[row][order[:count]].all(), "what stays is not the likeliest, or not the lowest"
        p = 1.0 if top_p is None else float(top_p[item])
        if p >= 1:
            assert count == limit
        elif limit > 0:
            mass = (ordered[:limit] / temperatures[row].double()).softmax(0)
            before = mass.cumsum(0) - mass
            assert count >= 1
            assert count == 1 or before[count - 1] < p + border
            assert count == limit or before[count] >= p - border
    unfiltered = torch.ones(len(logits), dtype=torch.bool, device=DEVICE)
    unfiltered[rows] = False
    assert torch.equal(stay[unfiltered], logits[unfiltered] > float("-inf"))
