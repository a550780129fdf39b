"""Logits that requests change: against transformers, on all ranks, in pieces, for any history."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine import draws
from nanovllm.engine.draws import Draws, Sampler
from nanovllm.engine.scheduler import Chunk, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.reference_sampling import SAMPLE_TILE
from nanovllm.layers.logit_edits import MASKED_ROWS, RequestEdits, forbid
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.utils.joined import KINDS, join, joined_size, split
from tests.logit_oracle import change, check_frequencies, distribution, random_changes
from tests.thread_ranks import on_ranks

CPU = torch.device("cpu")
ONE = ParallelGroup()
MAX_LEN = 64
ENDS = {3, 17}


def texts(rng: random.Random, vocab: int) -> tuple[list[int], list[int]]:
    """A prompt and what has been generated, with repetitions."""
    common = rng.choices(range(vocab), k=5)
    lengths = rng.randint(1, 30), rng.randint(0, 20)
    prompt, generated = (
        [rng.choice(common) if rng.random() < 0.5 else rng.randrange(vocab) for _ in range(length)]
        for length in lengths
    )
    return prompt, generated


def make_sampler(rows: int, vocab: int, group=ONE) -> Sampler:
    shard = Shard.of_tiles(vocab, SAMPLE_TILE, group)
    return Sampler(NotImplemented, torch.zeros(rows, dtype=torch.int64), MAX_LEN, group, shard)


def pack(sampler, seqs, masks=None, asks=True) -> Draws:
    step = Step(True, [Chunk(seq, 0, 1, needs_sample=True) for seq in seqs], asks)
    return sampler.pack(step, masks or {}, None)


def sequences(given, vocab: int) -> list[Sequence]:
    """Running requests whose next token is being drawn: params, prompt, and what was generated.

    ENDS and a token that is not there end them.
    """
    seqs = []
    for index, (params, prompt, generated) in enumerate(given):
        seq = Sequence(index, list(prompt), params, frozenset(), MAX_LEN, params.seed or 0)
        seq.token_ids += generated
        seq.edits = RequestEdits.of(params, {*ENDS, 10**9}, vocab)
        seq.request_index, seq.num_pending = index, 1
        seqs.append(seq)
    return seqs


def changed_rows(logits, given, masks=None) -> dict[int, torch.Tensor]:
    """The logits of the rows that change."""
    sampler, before = make_sampler(*logits.shape), logits.clone()
    found = {}
    for piece in split(pack(sampler, sequences(given, logits.shape[1]), masks).edits):
        batch, _, changed = sampler.change(logits, piece)
        found |= dict(zip(batch.rows.tolist(), changed, strict=True))
    assert torch.equal(logits, before) or logits.isnan().any()
    return found


# ------------------------------------------------------------------ the changed logits


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_logits_change_as_transformers_says(seed):
    """Rows of all kinds together; those that are too unlikely for min_p are -inf."""
    rng = random.Random(seed)
    vocab = rng.choice([30, 1000])
    logits = torch.randn(10, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    given = [
        (SamplingParams(rng.choice([0, 0.7, 2]), **random_changes(rng, vocab)), *texts(rng, vocab))
        for _ in logits
    ]
    found = changed_rows(logits, given)
    for row, (params, prompt, generated) in enumerate(given):
        right = change(logits[row], params, prompt, generated, ENDS)
        sure = torch.ones(vocab, dtype=torch.bool)
        if params.min_p and params.temperature:
            limit = SamplingParams(params.temperature, min_p=params.min_p)
            if params.min_p < 1:  # as float32, a logit at the limit may lie on either side of it
                least = right.double().max() + params.temperature * math.log(params.min_p)
                sure = (right - least).abs() > 1e-5
            right = right.masked_fill(distribution(right, limit) == 0, -torch.inf)
        torch.testing.assert_close(found.get(row, logits[row])[sure], right[sure])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_penalty_is_not_rounded_away(dtype):
    logits = torch.full((1, 4), 100.0, dtype=dtype)
    found = changed_rows(logits, [(SamplingParams(frequency_penalty=0.01), [1], [2])])
    torch.testing.assert_close(found[0], torch.tensor([100, 100, 99.99, 100]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"min_p": 0.1}, {"repetition_penalty": 1e-60}, {"logit_bias": {0: 1}}]
)
def test_nan_stays_and_infinities_make_no_new_one(changes):
    logits = torch.tensor([[0.0, 1, torch.inf, -torch.inf, 2], [0, 1, torch.nan, -3, 2]])
    found = changed_rows(logits, [(SamplingParams(**changes), [0, 1], [2, 3, 4])] * 2)
    assert torch.equal(torch.stack([found[0], found[1]]).isnan(), logits.isnan())


# ------------------------------------------------------------------ masks


def random_masks(count: int, vocab: int) -> tuple[np.ndarray, torch.Tensor]:
    """Masks, and the same as booleans [count, V]; bits behind the last token are noise."""
    allowed = torch.rand(count, vocab) < torch.rand(count, 1)
    allowed[:, random.randrange(vocab)] = True
    words = -(-vocab // 32)
    bits = torch.rand(count, words * 32) < 0.5
    bits[:, :vocab] = allowed
    packed = np.packbits(bits.numpy(), axis=1, bitorder="little").view("<i4")
    return packed.astype(np.int32), allowed


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000, 2 * SAMPLE_TILE + 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbidden_tokens_have_no_logits_and_nothing_else_changes(vocab, dtype):
    count = 3 * MASKED_ROWS
    rows = sorted(random.sample(range(count), random.choice([1, 5, count])))
    masks, allowed = random_masks(len(rows), vocab)
    logits = torch.randn(count, vocab).to(dtype)
    expected = logits.clone()
    for row, own in zip(rows, allowed, strict=True):
        expected[row, ~own] = float("-inf")
    shards = [Shard.of(vocab, ParallelGroup(rank, 3)) for rank in range(3)]
    parts = [logits[:, shard.span].clone() for shard in shards]
    for part, shard in zip(parts, shards, strict=True):
        forbid(part, torch.tensor(rows), torch.from_numpy(masks), shard)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=0)


def test_masks_join_other_changes():
    vocab, rows = 300, [1, 4, 5]
    masks, allowed = random_masks(2, vocab)
    biased = SamplingParams(logit_bias={7: 1e6}, regex="x+")
    given = [(biased if row in rows else SamplingParams(), [1], [2]) for row in range(6)]
    logits = torch.randn(6, vocab)
    found = changed_rows(logits, given, dict(zip(rows[1:], masks, strict=True)))
    expected = logits[rows].clone()
    expected[:, 7] += 1e6
    expected[1:][~allowed] = float("-inf")
    assert sorted(found) == rows
    torch.testing.assert_close(torch.stack([found[i] for i in rows]), expected, rtol=0, atol=0)


# ------------------------------------------------------------------ draws


def draw(logits, given, group=ONE) -> torch.Tensor:
    """Tokens; `given` are params, prompt and generated of each row."""
    rows, vocab = logits.shape
    sampler = make_sampler(rows, vocab, group)
    packed = pack(sampler, sequences(given, vocab))
    return sampler.draw(logits[:, sampler.shard.span], packed)[0]


def random_rows(rng: random.Random, count: int, vocab: int):
    rows = []
    for seed in range(count):
        limits = {"top_k": rng.choice([0, -1, 5, 50]), "top_p": rng.choice([1, 0.9, 0.4])}
        options = {**random_changes(rng, vocab), **limits, "seed": seed}
        params = SamplingParams(rng.choice([0, 0.7, 2]), **options)
        rows.append((params, *texts(rng, vocab)))
    return rows


@pytest.mark.parametrize("vocab", [300, 2 * SAMPLE_TILE + 17])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_draw_the_tokens_of_one(size, vocab):
    """Also where a rank has no part of the vocabulary."""
    rows = random_rows(random.Random(), 40, vocab)
    logits = (torch.randn(len(rows), vocab) * 3).bfloat16()

    assert sum(seq.asks for seq in sequences(rows, vocab)) > 20
    expected = draw(logits, rows)
    for tokens in on_ranks(size, lambda group: draw(logits, rows, group)):
        assert tokens.tolist() == expected.tolist()


def test_a_row_draws_the_same_whatever_else_is_in_the_batch(monkeypatch):
    rows = random_rows(random.Random(), 30, 200)
    logits = torch.randn(len(rows), 200) * 3
    together = draw(logits, rows).tolist()
    alone = [draw(logits[i : i + 1], rows[i : i + 1]).item() for i in range(len(rows))]
    assert alone == together
    monkeypatch.setattr(draws, "MOST_ROWS", 4)
    assert draw(logits, rows).tolist() == together
    assert draw(logits.flip(0), rows[::-1]).tolist() == together[::-1]


@pytest.mark.parametrize(
    "limits", [{}, {"top_k": 6}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.9}, {"min_p": 1}], ids=str
)
def test_tokens_are_drawn_as_often_as_the_definition_says(limits):
    """The order of the limits shows in what is left, and in how often it is drawn."""
    logits = torch.randn(20, generator=torch.Generator().manual_seed(1)) * 1.5
    params = SamplingParams(
        **{"temperature": 1.3, "min_p": 0.08, "repetition_penalty": 1.3, **limits},
        frequency_penalty=0.4, presence_penalty=-0.3, min_tokens=9, logit_bias={2: 1.0},
    )  # fmt: skip
    prompt, generated, count = [1, 2, 5, 5], [7, 7, 2, 8], 3000
    rows = [(replace(params, seed=seed), prompt, generated) for seed in range(count)]
    drawn = draw(logits.expand(count, 20), rows)
    changed = change(logits, params, prompt, generated, ENDS)
    check_frequencies(drawn, distribution(changed, params))


# ------------------------------------------------------------------ which requests pay


def test_options_that_change_nothing_are_no_edits():
    for params in (
        SamplingParams(),
        SamplingParams(0, min_p=0.5),
        SamplingParams(top_k=0, repetition_penalty=1, logit_bias={}),
    ):
        assert RequestEdits.of(params, {1, 2}, 10) is None


def test_a_batch_in_which_no_row_asks_packs_nothing():
    sampler, limited = make_sampler(4, 50), SamplingParams(min_tokens=2)
    plain, asking, over = sequences(
        [(SamplingParams(), [1, 2], [3]), (limited, [1, 2], [3]), (limited, [1, 2], [3, 4])], 50
    )
    assert [seq.asks for seq in (plain, asking, over)] == [False, True, True]
    assert len(pack(sampler, [plain, over]).edits) == 0
    assert len(pack(sampler, [plain, asking]).edits) > 0
    assert len(pack(sampler, [plain, asking], asks=False).edits) == 0  # it is not even looked at


@pytest.mark.parametrize(
    ("options", "width"), [({"logit_bias": {4: 100.0}}, 0), ({"presence_penalty": 1}, 4)]
)
def test_only_penalties_need_a_history(options, width):
    sampler, given = make_sampler(4, 50), [(SamplingParams(0, **options), [1, 2], [3])]
    sampler.draw(torch.randn(2, 50), pack(sampler, sequences(given, 50)))
    assert sampler.history.shape == (4, width)


# ------------------------------------------------------------------ how it travels


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=5), st.data())
@settings(max_examples=50, deadline=None)
def test_joined_arrays_are_split_again(lists, data):
    """Also as a part of others, and with something behind them."""
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=len(lists), max_size=len(lists)))
    arrays = [np.array(each, kind) for each, (kind, _) in zip(lists, kinds, strict=True)]
    joined = join([np.ones(3, np.int32), join(arrays)])
    assert joined_size(joined) == len(joined)
    (_, again) = split(np.append(joined, joined))
    for parts in (split(again), split(again, CPU)):
        assert [(part.tolist(), str(part.dtype).split(".")[-1]) for part in parts] == [
            (array.tolist(), str(array.dtype)) for array in arrays
        ]
