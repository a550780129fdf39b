"""Draws and sums over a part of the vocabulary agree with their references."""

import pytest
import torch

from nanovllm.kernels import reference_sampling, sampling, split_logits
from nanovllm.kernels.reference_sampling import SAMPLE_TILE, Search, key_of, token_of, value_of
from tests.kernels.cases import DEVICE, decided, sampling_case

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@DTYPES
@pytest.mark.parametrize("vocab", [0, 5, 2 * SAMPLE_TILE + 3])
def test_parts_draw_as_their_reference_does(poison, vocab, dtype):
    case, part = sampling_case(7, vocab, dtype), (3 * SAMPLE_TILE, 9 * SAMPLE_TILE)

    def expected(*case):
        return token_of(reference_sampling.sample(*case, None, part))

    tokens, rows = token_of(sampling.sample(*case, None, part)), decided(expected, case)
    assert torch.equal(tokens[rows], expected(*case)[rows])
    inside = (tokens >= part[0]) & (tokens < part[0] + vocab)
    assert inside.all() if vocab else (tokens == -1).all()


@DTYPES
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("vocab", [0, 1, 300, 9000])
def test_passes_of_a_search(poison, vocab, counted, dtype):
    """Two parts of a vocabulary of which one is twice the other, so that sums differ."""
    logits, temperatures, *_ = sampling_case(5, vocab, dtype)
    temperatures = temperatures.clamp(min=0.1)
    if vocab:
        logits[1, :] = float("-inf")
        logits[2, 0] = float("nan")
        logits[4, 0] = float("inf")
    rows = torch.tensor([0, 1, 2, 4], device=DEVICE)
    peaks = torch.tensor([9.0, 9.0, 9.0, torch.finfo(torch.float32).max], device=DEVICE)
    bottom, top = key_of(torch.tensor([[-9.0], [9.0]], device=DEVICE), dtype).expand(2, 4)
    search = Search(bottom.clone(), top.clone(), torch.zeros_like(peaks))
    whole = torch.full_like(bottom, -(2**31) >> reference_sampling.KEY_SHIFTS.get(dtype, 0))
    _, total = reference_sampling.narrow(
        logits, temperatures, rows, peaks, Search(whole, whole + 16, peaks), None, peaks, counted
    )
    target = 3 * total[:, 0] * torch.tensor([0.0, 0.5, 1.2, 0.01], device=DEVICE)
    gathered = None
    for _ in range(4):
        now = logits, temperatures, rows, peaks, search, gathered, target, counted
        search, sums = split_logits.narrow(*now)
        expected, expected_sums = reference_sampling.narrow(*now)
        assert torch.equal(search.bottom, expected.bottom)
        assert torch.equal(search.top, expected.top)
        torch.testing.assert_close(search.above, expected.above, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums, expected_sums, rtol=1e-4, atol=1e-4)
        gathered = torch.stack([expected_sums, 2 * expected_sums])


@DTYPES
@pytest.mark.parametrize("vocab", [0, 1, 300, 9000])
def test_what_stays_is_collected_and_ties_are_counted(poison, monkeypatch, vocab, dtype):
    monkeypatch.setattr(split_logits, "ROW_TILE", 256)
    logits = (sampling_case(6, vocab, dtype)[0] * 2).round() / 2  # many ties
    if vocab:
        logits[1, :] = float("-inf")
        logits[2, 0] = float("nan")
        logits[3, vocab // 2] = float("inf")
    rows = torch.tensor([0, 1, 2, 3, 5], device=DEVICE)
    ordered = torch.nn.functional.pad(logits.float().nan_to_num(-9.0), (0, 20), value=-99.0)
    least = ordered.topk(20).values[:, 11].contiguous()
    threshold = least, torch.full((6,), vocab // 2, device=DEVICE).int()
    everything, _ = reference_sampling.collect(logits, rows, threshold, vocab + 1)
    count = int((everything > float("-inf")).sum(1).max()) + 3
    for found, expected in zip(
        split_logits.collect(logits, rows, threshold, count),
        reference_sampling.collect(logits, rows, threshold, count),
        strict=True,
    ):
        assert torch.equal(found, expected)
    stay = torch.tensor([0, 3, 1, 2, 10_000], device=DEVICE).int()
    ends = split_logits.tie_end(logits, rows, threshold[0][rows], stay)
    assert torch.equal(ends, reference_sampling.tie_end(logits, rows, threshold[0][rows], stay))


def test_what_stays_and_which_ties():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, float("nan"), 2.0, float("-inf")]])
    threshold = torch.tensor([2.0]), torch.tensor([3])
    rows = torch.tensor([0])
    values, tokens = reference_sampling.collect(logits, rows, threshold, 4)
    assert values.tolist() == [[3.0, 2.0, 2.0, float("-inf")]]
    assert tokens.tolist() == [[0, 2, 3, -1]]
    for stay, end in enumerate([-1, 2, 3, 5, 5]):
        found = reference_sampling.tie_end(logits, rows, threshold[0], torch.tensor([stay]))
        assert found.tolist() == [end]


@DTYPES
def test_keys_order_values_and_give_them_back(dtype):
    values = (torch.randn(1000, device=DEVICE) * 10).to(dtype).float().sort().values
    keys = key_of(values, dtype)
    assert torch.equal(keys, keys.sort().values)
    assert torch.equal(value_of(keys, dtype), values)
    assert key_of(torch.tensor([-0.0]), dtype) == key_of(torch.tensor([0.0]), dtype)
