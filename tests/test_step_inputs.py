"""The flat input buffer of a step against an obvious reference, token by token."""

import itertools
import random

import numpy as np
import pytest
import torch

from nanovllm.engine.block_manager import PADDING_BLOCK
from nanovllm.engine.scheduler import Chunk
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import (
    StepInputs,
    StepLayout,
    balance,
    decode_first,
    dummy_chunk,
    micro_batches,
)
from nanovllm.layers.attention import HeadShape
from nanovllm.sampling_params import SamplingParams
from tests.decode_cases import PlanningBackend

MAX_BLOCKS = 9
RUBBISH = -77
LAST_TOKENS = torch.arange(20_000, 20_100)  # of requests 0 to 99, on the device


def random_chunk(rng: random.Random, block_size: int, index: int, *, decode: bool) -> Chunk:
    """A part of a sequence that holds just the blocks it needs; its last token may be pending."""
    length = rng.randint(1, MAX_BLOCKS * block_size)
    blocks = rng.sample(range(1, 500), -(-length // block_size))
    end = length if decode else rng.randint(1, length)
    start = end - 1 if decode else rng.randint(0, end - 1)
    pending = rng.random() < 0.4
    seq = Sequence(
        request_id=index,
        token_ids=[rng.randrange(10_000) for _ in range(length - pending)],
        params=SamplingParams(),
        stop_ids=frozenset(),
        max_len=10_000,
        seed=0,
        block_table=blocks,
        num_pending=int(pending),
        request_index=index,
    )
    return Chunk(seq, start, end, needs_sample=end == length)


def inputs_of(block_size: int = 16) -> StepInputs:
    return StepInputs(block_size, MAX_BLOCKS, PlanningBackend(HeadShape(2, 1, 64)))


def decode_layout(size: int, parts: int = 1, plan: int = 0) -> StepLayout:
    return inputs_of().decode_layout(plan, size, parts)


def mixed_layout(chunks: list[Chunk], parts: list[list[int]]) -> StepLayout:
    return inputs_of().mixed_layout(0, [[chunks[i] for i in part] for part in parts])


def token_of(chunk: Chunk, position: int) -> int:
    known = position < len(chunk.seq.token_ids)
    return chunk.seq.token_ids[position] if known else int(LAST_TOKENS[chunk.seq.request_index])


def expected_rows(decode_rows, chunks, block_size) -> dict[str, list]:
    """What one micro-batch is to hold, in Python's plainest words."""
    names = ("input_ids", "positions", "slot_mapping", "context_lens", "block_tables", "plan")
    fields: dict[str, list] = {name: [] for name in names} | {"cu_seqlens_q": [0]}
    decoding = [chunk for chunk in chunks if chunk.end - chunk.start == 1]
    prompts = [chunk for chunk in chunks if chunk.end - chunk.start > 1]
    padding = [dummy_chunk(0, 1)] * (decode_rows - len(decoding))
    for chunk in [*decoding, *padding, *prompts]:
        table = chunk.seq.block_table + [PADDING_BLOCK] * MAX_BLOCKS
        for position in range(chunk.start, chunk.end):
            fields["input_ids"].append(token_of(chunk, position))
            fields["positions"].append(position)
            slot = table[position // block_size] * block_size + position % block_size
            fields["slot_mapping"].append(slot)
        fields["context_lens"].append(chunk.end)
        fields["block_tables"].append(table[:MAX_BLOCKS])
        if chunk in prompts:
            fields["cu_seqlens_q"].append(fields["cu_seqlens_q"][-1] + chunk.end - chunk.start)
        else:  # see `PlanningBackend`; padding is no work
            fields["plan"].append(0 if chunk in padding else chunk.end)
    return fields


def held_by(batch) -> dict[str, list]:
    """What a micro-batch holds."""
    inputs, places = batch.inputs, batch.inputs.metadata
    parts = [part for part in (places.decode, places.prefill) if part is not None]
    return {
        "input_ids": inputs.input_ids.tolist(),
        "positions": inputs.positions.tolist(),
        "slot_mapping": places.slot_mapping.tolist(),
        "context_lens": [length for part in parts for length in part.context_lens.tolist()],
        "block_tables": [table for part in parts for table in part.block_tables.tolist()],
        "plan": places.decode.plan.tolist() if places.decode else [],
        "cu_seqlens_q": places.prefill.cu_seqlens_q.tolist() if places.prefill else [0],
    }


def filled(layout, chunks, parts, block_size=16) -> torch.Tensor:
    flat = torch.full((layout.size,), RUBBISH, dtype=torch.int32)
    inputs_of(block_size).fill(layout, chunks, parts, flat.numpy())
    return flat


def check(layout, chunks, block_size, parts) -> None:
    flat = filled(layout, chunks, parts, block_size)
    batches, rows = micro_batches(layout, flat, LAST_TOKENS, "scratch")
    for size, part, batch in zip(layout.micro_batches, parts, batches, strict=True):
        own = [chunks[i] for i in part]
        assert held_by(batch) == expected_rows(size.decode_rows, own, block_size)
        decode, prefill = batch.inputs.metadata.decode, batch.inputs.metadata.prefill
        assert decode is None or decode.workspace == "scratch"
        longest = max((chunk.end - chunk.start for chunk in own), default=0)
        assert longest <= 1 if prefill is None else prefill.max_seqlen_q == longest
    if rows is None:
        assert layout.is_decode
    else:
        sampled = [chunk for chunk in chunks if chunk.needs_sample]
        assert len(rows) == layout.num_samples >= len(sampled)
        # In the order of the chunks, whatever micro-batch they are in.
        ids = torch.cat([batch.inputs.input_ids for batch in batches])[rows].tolist()
        assert ids[: len(sampled)] == [token_of(chunk, chunk.end - 1) for chunk in sampled]
        assert not rows[len(sampled) :].any()
    assert RUBBISH not in flat


@pytest.mark.parametrize("block_size", [1, 16, 48, 256])
@pytest.mark.parametrize("seed", range(20))
def test_rows_of_both_kinds_in_any_number_of_micro_batches(seed, block_size):
    rng = random.Random(seed)
    share = rng.choice([0, 0.5])  # that decodes
    chunks = [random_chunk(rng, block_size, i, decode=rng.random() < share) for i in range(9)]
    numbers = decode_first(chunks)
    count = rng.randint(1, 4)
    parts = [numbers[i::count] for i in range(count)]
    check(mixed_layout(chunks, parts), chunks, block_size, parts=parts)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize(
    ("count", "size"), [(0, 4), (1, 4), (1, 8), (5, 8), (7, 8), (8, 8), (4, 4), (5, 7)]
)
def test_decode_in_micro_batches_with_padding_in_each(count, size, block_size, parts):
    rng = random.Random(count)
    chunks = [random_chunk(rng, block_size, i, decode=True) for i in range(count)]
    layout = decode_layout(size, parts)
    check(layout, chunks, block_size, parts=balance([chunk.end for chunk in chunks], layout))


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("size", range(4, 12))
def test_micro_batches_of_equal_sequences_are_as_equal_as_may_be(size, parts):
    for count in range(1, size + 1):
        dealt = balance([100] * count, decode_layout(size, parts))
        sizes = [len(part) for part in dealt]
        assert sorted(itertools.chain.from_iterable(dealt)) == list(range(count))
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("parts", [2, 3, 4])
@pytest.mark.parametrize("seed", range(20))
def test_micro_batches_carry_the_same_work(seed, parts):
    """As far as whole sequences allow: two differ by no more than one of them."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(16, 300))
    lengths = rng.integers(1, 4096, int(rng.integers(size * 3 // 4 + 1, size + 1)))
    layout = decode_layout(size, parts)
    dealt = balance(lengths.tolist(), layout)
    assert sorted(itertools.chain.from_iterable(dealt)) == list(range(len(lengths)))
    for part, rows in zip(dealt, layout.micro_batches, strict=True):
        assert len(part) <= rows.decode_rows
    tokens = [int(lengths[part].sum()) for part in dealt if part]
    # One that is full takes no more, so it may stay behind.
    full = any(len(p) == r.decode_rows for p, r in zip(dealt, layout.micro_batches, strict=True))
    assert max(tokens) - min(tokens) <= lengths.max() * (2 if full else 1)


def test_prompts_without_samples():
    rng = random.Random(0)
    chunk = random_chunk(rng, 16, 0, decode=False)
    for end in (1, 2):
        chunks = [Chunk(chunk.seq, 0, end, needs_sample=False)]
        layout = mixed_layout(chunks, [[0]])
        assert layout.num_samples == 0
        check(layout, chunks, 16, [[0]])


def test_micro_batches_are_views_of_the_buffer():
    """So that a captured graph reads what is copied there."""
    layout = decode_layout(5, 2)
    flat = filled(layout, [], [[], []])
    batches, _ = micro_batches(layout, flat, LAST_TOKENS, None)
    batches[1].inputs.positions.fill_(-5)
    assert flat.tolist().count(-5) == 2


@pytest.mark.parametrize("seed", range(4))
def test_a_layout_travels_as_integers_and_names_its_plan(seed):
    rng = random.Random(seed)
    chunks = [random_chunk(rng, 16, i, decode=rng.random() < 0.5) for i in range(6)]
    mixed = mixed_layout(chunks, [decode_first(chunks)])
    for layout in (decode_layout(7, 3, plan=4), decode_layout(1), mixed):
        integers = layout.to_integers()
        assert all(isinstance(value, int) for value in integers)
        assert StepLayout.from_integers(integers) == layout
    assert decode_layout(7, 3, plan=4).to_integers()[0] == 4
