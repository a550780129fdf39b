"""Decode attention over the paged cache: shapes, shares of the work, tunings, workspaces."""

import random

import numpy as np
import pytest
import torch

from nanovllm.kernels import paged_decode
from tests.kernels.cases import CUDA, DEVICE, HALF, close
from tests.kernels.paged_case import HOPPER, TUNINGS, PagedCase

RAGGED = [1, 200, 64, 65, 17]
TUNING = pytest.mark.parametrize("tuning", TUNINGS.values(), ids=TUNINGS)


@TUNING
@pytest.mark.parametrize("block_size", [256, 64, 48, 16])
@pytest.mark.parametrize("num_sms", [1, 3, 40])
def test_decode_of_ragged_lengths(poison, block_size, num_sms, tuning):
    case = PagedCase(RAGGED, 4, 2, 64, block_size)
    close(case.decode(num_sms, tuning, ctas_per_sm=1), case.dense())


@TUNING
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
@pytest.mark.parametrize("group", [1, 2, 4, 5, 8])
def test_decode_of_grouped_heads(poison, group, dim, tuning):
    case = PagedCase([130, 3], 2 * group, 2, dim, 64)
    close(case.decode(2, tuning), case.dense())


@TUNING
@pytest.mark.parametrize("lengths", [[1], [1000], [1, 1, 1, 1], [640, 1], [63, 64, 65, 128, 129]])
@pytest.mark.parametrize("programs", [1, 2, 3, 4, 7, 30])
def test_decode_shares(poison, lengths, programs, tuning):
    """Few long sequences, many short ones, more programs than tiles and fewer."""
    case = PagedCase(lengths, 2, 1, 32, 64)
    close(case.decode(programs, tuning, ctas_per_sm=1), case.dense())


def test_decode_of_more_sequences_than_are_searched_at_once(poison):
    case = PagedCase([1, 2, 70] * 172, 1, 1, 32, 64)
    close(case.decode(3, ctas_per_sm=1), case.dense())


def test_decode_joins_more_partials_than_one_chunk_holds(poison):
    case = PagedCase([3000, 5], 8, 1, 32, 64)
    close(case.decode(45, ctas_per_sm=1, num_warps=1), case.dense())


@TUNING
def test_decode_into_rows_of_a_larger_result(poison, tuning):
    case = PagedCase(RAGGED, 4, 2, 64, 64)
    out = torch.full((9, *case.q.shape[1:]), 7.0, device=DEVICE)
    assert case.decode(3, tuning, out[:5]).data_ptr() == out.data_ptr()
    close(out[:5], case.dense())
    assert (out[5:] == 7).all()


@TUNING
@pytest.mark.parametrize("dtype", HALF)
def test_decode_in_16_bits(poison, dtype, tuning):
    case = PagedCase(RAGGED, 4, 2, 64, 256, dtype=dtype)
    close(case.decode(2, tuning), case.dense(), dtype)


@TUNING
def test_a_workspace_serves_changing_lengths(tuning):
    """As in a replayed graph: same shapes and buffers, other lengths."""
    workspace = paged_decode.DecodeWorkspace(5, 2, 1, 32, DEVICE, tuning)
    for lengths in ([500, 3], [1, 1], [64, 700], [1, 65]):
        case = PagedCase(lengths, 2, 1, 32, 64)
        close(case.decode_in(workspace), case.dense())
        assert not workspace.arrivals.any()  # or the next launch would join too early


@TUNING
def test_sequences_without_tiles_are_skipped(tuning):
    """The padding of a captured step; also a step of nothing else."""
    lengths = [300, 5, 64, 129]
    for count in (4, 3, 0):
        case = PagedCase(lengths, 4, 2, 32, 64)
        workspace = paged_decode.DecodeWorkspace(5, 4, 2, 32, DEVICE, tuning)
        out = case.decode_in(workspace, count)
        close(out[:count], case.dense()[:count])
        assert not workspace.arrivals.any()


def test_a_workspace_serves_either_tuning(monkeypatch):
    """The batch decides: few sequences and many need different grids."""
    if "tma" not in TUNINGS:
        pytest.skip("Triton without descriptors")
    monkeypatch.setattr(paged_decode, "is_hopper_or_newer", lambda: not CUDA or HOPPER)
    workspace = paged_decode.DecodeWorkspace(81, 2, 1, 32, DEVICE)
    for count in (1, 82, 81):
        case = PagedCase([random.randint(1, 130) for _ in range(count)], 2, 1, 32, 64)
        close(case.decode_in(workspace), case.dense())
        assert not workspace.arrivals.any()


def test_tuning_for_few_items_and_many(monkeypatch):
    plain, tma, keys_first = paged_decode.PLAIN, paged_decode.TMA, paged_decode.KEYS_FIRST
    tuning_for = paged_decode.tuning_for
    monkeypatch.setattr(paged_decode, "is_hopper_or_newer", lambda: True)
    assert tuning_for(132, 8 * 512, 2) is keys_first
    assert tuning_for(32, 8 * 512, 4) is keys_first
    assert tuning_for(132, 8, 4) is tma
    assert tuning_for(132, 8, 5) is keys_first
    assert tuning_for(32, 8, 2) is keys_first
    monkeypatch.setattr(paged_decode, "is_hopper_or_newer", lambda: False)
    assert tuning_for(32, 8, 2) is plain
    assert tuning_for(32, 8 * 512, 5) is plain


def test_tile_offsets():
    offsets = paged_decode.tile_offsets(np.array([1, 64, 65, 200], dtype=np.int32))
    assert offsets.dtype == np.int32
    assert offsets.tolist() == [0, 1, 2, 4, 8]
    assert paged_decode.tile_offsets(np.array([65, 0, 0])).tolist() == [0, 2, 2, 2]
