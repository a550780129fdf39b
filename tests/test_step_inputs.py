"""The flat input buffer of a step against an obvious reference, token by token."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nanovllm.engine.block_manager import PADDING_BLOCK
from nanovllm.engine.scheduler import Chunk
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import InputLayout, fill_inputs, micro_batch_rows, step_tensors
from nanovllm.layers.attention import HeadShape
from nanovllm.sampling_params import SamplingParams
from tests.decode_cases import PlanningBackend

BACKEND = PlanningBackend(HeadShape(2, 1, 64))
MAX_BLOCKS = 9
RUBBISH = -77


def random_chunk(rng: random.Random, block_size: int, seat: int, *, decode: bool) -> Chunk:
    """A part of a sequence that holds just the blocks it needs."""
    length = rng.randint(1, MAX_BLOCKS * block_size)
    blocks = rng.sample(range(1, 500), -(-length // block_size))
    end = length if decode else rng.randint(1, length)
    start = end - 1 if decode else rng.randint(0, end - 1)
    pending = decode and rng.random() < 0.4
    seq = Sequence(
        request_id=seat,
        token_ids=[rng.randrange(10_000) for _ in range(length - pending)],
        params=SamplingParams(),
        stop_ids=frozenset(),
        max_len=10_000,
        seed=0,
        block_table=blocks,
        num_pending=int(pending),
        seat=seat,
    )
    return Chunk(seq, start, end, samples=end == length)


def expected_fields(layout, chunks, block_size, rows) -> dict[str, list]:
    """What `fill_inputs` is to write, in Python's plainest words."""
    fields: dict[str, list] = {
        name: [] for name in ("input_ids", "positions", "slot_mapping", "context_lens")
    }
    fields["block_tables"] = []
    by_row = dict(zip(rows, chunks, strict=True))
    ends, sampled, plan = [0], [], []
    for row in range(layout.num_seqs):
        chunk = by_row.get(row)
        if chunk is None:
            fields["input_ids"].append(0)
            fields["positions"].append(0)
            fields["slot_mapping"].append(PADDING_BLOCK * block_size)
            fields["context_lens"].append(1)
            fields["block_tables"].append([PADDING_BLOCK] * layout.max_blocks)
            plan.append(0)
            continue
        seq, table = chunk.seq, chunk.seq.block_table
        for position in range(chunk.start, chunk.end):
            known = position < len(seq.token_ids)
            fields["input_ids"].append(seq.token_ids[position] if known else -1 - seq.seat)
            fields["positions"].append(position)
            slot = table[position // block_size] * block_size + position % block_size
            fields["slot_mapping"].append(slot)
        fields["context_lens"].append(chunk.end)
        padding = [PADDING_BLOCK] * (layout.max_blocks - len(table))
        fields["block_tables"].append(table + padding)
        ends.append(len(fields["input_ids"]))
        plan.append(chunk.end)
        if chunk.samples:
            sampled.append(ends[-1] - 1)
    if layout.pipelined:
        padding = [0] * (layout.num_samples - len(chunks))
        return {**fields, "plan": plan, "sample_rows": [*rows, *padding]}
    if layout.is_decode:
        return {**fields, "plan": plan}
    return {**fields, "cu_seqlens_q": ends, "sample_rows": sampled}


def check(layout, chunks, block_size, rows=None) -> None:
    flat = np.full(layout.size, RUBBISH, np.int32)
    fill_inputs(layout, chunks, block_size, BACKEND, flat, rows)
    held = range(len(chunks)) if rows is None else rows.tolist()
    expected = expected_fields(layout, chunks, block_size, held)
    views = layout.views(flat)
    assert list(views) == list(layout.shapes)
    for name, view in views.items():
        assert view.tolist() == expected[name], name
        assert view.shape == layout.shapes[name]
    assert sum(view.size for view in views.values()) == layout.size


@pytest.mark.parametrize("block_size", [1, 16, 48, 256])
@pytest.mark.parametrize("seed", range(6))
def test_prefill(seed, block_size):
    rng = random.Random(seed)
    chunks = [random_chunk(rng, block_size, i, decode=False) for i in range(rng.randint(1, 7))]
    check(InputLayout.prefill(chunks, MAX_BLOCKS), chunks, block_size)


@pytest.mark.parametrize("padding", [0, 1, 5])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("seed", range(4))
def test_decode(seed, block_size, padding):
    rng = random.Random(seed)
    chunks = [random_chunk(rng, block_size, i, decode=True) for i in range(rng.randint(1, 9))]
    check(InputLayout.decode(len(chunks) + padding, MAX_BLOCKS, BACKEND), chunks, block_size)


@pytest.mark.parametrize(
    ("count", "size"), [(1, 2), (1, 8), (5, 8), (7, 8), (8, 8), (3, 3), (5, 7)]
)
def test_decode_in_two_halves_with_padding_in_each(count, size):
    rng = random.Random(count)
    chunks = [random_chunk(rng, 16, i, decode=True) for i in range(count)]
    rows = micro_batch_rows(np.array([chunk.end for chunk in chunks]), size)
    check(InputLayout.decode(size, MAX_BLOCKS, BACKEND, pipelined=True), chunks, 16, rows=rows)


@pytest.mark.parametrize("size", range(1, 12))
def test_micro_batches_of_equal_sequences_are_as_equal_as_may_be(size):
    for count in range(1, size + 1):
        rows = micro_batch_rows(np.full(count, 100), size)
        assert len(set(rows.tolist())) == count
        assert sum(rows < (size + 1) // 2) == (count + 1) // 2
        assert max(rows) < size


@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_carry_the_same_work(seed):
    """As far as whole sequences allow: the halves differ by no more than one of them."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(16, 300))
    lengths = rng.integers(1, 4096, int(rng.integers(size // 2 + 1, size + 1)))
    rows = micro_batch_rows(lengths, size)
    first = rows < (size + 1) // 2
    assert len(set(rows.tolist())) == len(lengths)
    assert abs(int(lengths[first].sum()) - int(lengths[~first].sum())) <= lengths.max()


def test_one_long_sequence_is_balanced_by_many_short_ones():
    lengths = np.array([100, 1000, 100, 100, 100, 100])
    rows = micro_batch_rows(lengths, 12)
    assert (rows < 6).tolist() == [False, True, False, False, False, False]


def test_a_step_of_padding_alone():
    check(InputLayout.decode(4, MAX_BLOCKS, BACKEND), [], 16)


def test_prefill_without_samples():
    rng = random.Random(0)
    chunk = random_chunk(rng, 16, 0, decode=False)
    chunk = Chunk(chunk.seq, 0, 1, samples=False)
    layout = InputLayout.prefill([chunk], MAX_BLOCKS)
    assert layout.num_samples == 0
    check(layout, [chunk], 16)


def test_views_of_a_tensor_are_views():
    layout = InputLayout.decode(3, 4, BACKEND)
    flat = torch.arange(layout.size, dtype=torch.int32)
    views = layout.views(flat)
    assert torch.equal(torch.cat([view.flatten() for view in views.values()]), flat)
    views["positions"].fill_(-5)
    assert flat.tolist().count(-5) == 3


def test_step_tensors_of_decode_resolve_pending_tokens():
    rng = random.Random(5)
    chunks = [random_chunk(rng, 16, seat, decode=True) for seat in range(8)]
    pending = [chunk.seq.num_pending for chunk in chunks]
    assert 0 < sum(pending) < 8
    layout = InputLayout.decode(8, MAX_BLOCKS, BACKEND)
    flat = torch.empty(layout.size, dtype=torch.int32)
    fill_inputs(layout, chunks, 16, BACKEND, flat.numpy())
    last_tokens = torch.arange(100, 108)
    (tensors,) = step_tensors(layout, flat, last_tokens, BACKEND, "scratch")
    assert tensors.input_ids.tolist() == [
        last_tokens[c.seq.seat] if c.seq.num_pending else c.seq.token_ids[-1] for c in chunks
    ]
    decode = tensors.metadata.decode
    assert tensors.metadata.prefill is None
    assert decode.workspace == "scratch"
    assert decode.context_lens.tolist() == decode.plan.tolist() == [chunk.end for chunk in chunks]
    assert tensors.sample_rows is None


def test_each_micro_batch_has_its_own_rows_and_its_own_plan():
    chunks = [random_chunk(random.Random(3), 16, seat, decode=True) for seat in range(5)]
    layout = InputLayout.decode(7, MAX_BLOCKS, BACKEND, pipelined=True)
    rows = micro_batch_rows(np.array([chunk.end for chunk in chunks]), 7)
    flat = torch.empty(layout.size, dtype=torch.int32)
    fill_inputs(layout, chunks, 16, BACKEND, flat.numpy(), rows)
    parts = step_tensors(layout, flat, torch.zeros(8, dtype=torch.int64), BACKEND, None)
    views = layout.views(flat)
    assert [len(part.positions) for part in parts] == [4, 3]
    assert torch.equal(torch.cat([part.positions for part in parts]), views["positions"])
    plans = torch.cat([part.metadata.decode.plan for part in parts])
    assert plans[rows].tolist() == [chunk.end for chunk in chunks]
    assert plans.count_nonzero() == 5


def test_step_tensors_of_prefill():
    rng = random.Random(6)
    chunks = [random_chunk(rng, 16, seat, decode=False) for seat in range(3)]
    layout = InputLayout.prefill(chunks, MAX_BLOCKS)
    flat = torch.empty(layout.size, dtype=torch.int32)
    fill_inputs(layout, chunks, 16, BACKEND, flat.numpy())
    (tensors,) = step_tensors(layout, flat, torch.zeros(8), BACKEND, None)
    assert tensors.metadata.decode is None
    sizes = [chunk.end - chunk.start for chunk in chunks]
    assert tensors.metadata.prefill.cu_seqlens_q.diff().tolist() == sizes
    assert tensors.metadata.prefill.max_seqlen_q == max(sizes)
    assert tensors.positions[0] == chunks[0].start
    assert len(tensors.sample_rows) == sum(chunk.samples for chunk in chunks)
