"""Logits that requests change: against transformers, on all ranks, in pieces, for any history."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine import draws
from nanovllm.engine.draws import EditedDraws
from nanovllm.engine.sequence import Sequence
from nanovllm.kernels.reference import SAMPLE_TILE
from nanovllm.layers.logit_edits import EditBatch, RequestEdits, edit
from nanovllm.layers.parallel import ParallelGroup, Shard
from tests.logit_oracle import change, distribution, random_changes
from tests.thread_ranks import on_ranks

CPU = torch.device("cpu")
ONE = ParallelGroup()
MAX_LEN = 64


def sequence(params, prompt, generated, request_index, edits) -> Sequence:
    """A running request whose next token is being drawn."""
    seq = Sequence(
        request_id=request_index,
        token_ids=list(prompt),
        params=params,
        stop_ids=frozenset(),
        max_len=MAX_LEN,
        seed=params.seed or 0,
        edits=edits,
        num_pending=1,
        request_index=request_index,
    )
    seq.token_ids += generated
    return seq


def texts(rng: random.Random, vocab: int) -> tuple[list[int], list[int]]:
    """A prompt and what has been generated, with repetitions."""
    common = rng.choices(range(vocab), k=5)
    lengths = rng.randint(1, 30), rng.randint(0, 20)
    prompt, generated = (
        [rng.choice(common) if rng.random() < 0.5 else rng.randrange(vocab) for _ in range(length)]
        for length in lengths
    )
    return prompt, generated


# ------------------------------------------------------------------ the changed logits


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_logits_change_as_transformers_says(seed):
    """Rows of all kinds together; those that are too unlikely for min_p are -inf."""
    rng = random.Random(seed)
    vocab, ends = rng.choice([30, 1000]), {3, 17, 10**9}
    logits = torch.randn(20, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    rows, edits, counts, histories, tokens, expected = [], [], [], [], [], []
    for row in sorted(rng.sample(range(20), 8)):
        temperature = rng.choice([0, 0.7, 2])
        params = SamplingParams(temperature=temperature, **random_changes(rng, vocab))
        prompt, generated = texts(rng, vocab)
        changes = RequestEdits.of(params, ends, vocab)
        if changes is None or not changes.change(len(generated)):
            assert params.min_p == 0 or temperature == 0
            assert torch.equal(change(logits[row], params, prompt, generated, {3, 17}), logits[row])
            continue
        changed = change(logits[row], params, prompt, generated, {3, 17})
        if params.min_p and temperature:
            unlikely = distribution(changed, SamplingParams(temperature, min_p=params.min_p)) == 0
            changed = changed.masked_fill(unlikely, -torch.inf)
        item = (row, changes, len(generated), prompt + generated, len(prompt), changed)
        at = len(histories) if changes.penalties else len(rows)
        for values, value in zip((rows, edits, counts), item[:3], strict=True):
            values.insert(at, value)
        expected.insert(at, changed)
        if changes.penalties:
            histories.append((row, len(prompt + generated), len(prompt)))
            tokens.append(prompt + generated)
    if not rows:
        return
    packed = EditBatch.pack(rows, edits, counts, histories, {})
    batch = EditBatch.unpack(packed, CPU)
    history = torch.full((len(histories), batch.longest), 5)  # what is behind a row is no token
    for place, ids in enumerate(tokens):
        history[place, : len(ids)] = torch.tensor(ids)
    before = logits.clone()
    found = edit(logits, batch, history, ONE, Shard.of(vocab, ONE))
    torch.testing.assert_close(found, torch.stack(expected))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_penalty_is_not_rounded_away(dtype):
    logits = torch.full((1, 4), 100.0, dtype=dtype)
    edits = RequestEdits.of(SamplingParams(frequency_penalty=0.01), (), 4)
    batch = EditBatch.unpack(EditBatch.pack([0], [edits], [1], [(0, 2, 1)], {}), CPU)
    found = edit(logits, batch, torch.tensor([[1, 2]]), ONE, Shard.of(4, ONE))
    torch.testing.assert_close(found, torch.tensor([[100, 100, 99.99, 100]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{"min_p": 0.1}, {"repetition_penalty": 1e-60}, {"logit_bias": {0: 1}}]
)
def test_nan_stays_and_infinities_make_no_new_one(changes):
    logits = torch.tensor([[0.0, 1, torch.inf, -torch.inf, 2], [0, 1, torch.nan, -3, 2]])
    edits = RequestEdits.of(SamplingParams(**changes), (), 5)
    histories = [(row, 5, 2) for row in range(2)] if edits.penalties else []
    batch = EditBatch.unpack(EditBatch.pack([0, 1], [edits] * 2, [3, 3], histories, {}), CPU)
    history = torch.arange(5).expand(len(histories), 5)
    found = edit(logits, batch, history, ONE, Shard.of(5, ONE))
    assert torch.equal(found.isnan(), logits.isnan())


# ------------------------------------------------------------------ draws


def draw(logits, given, group=ONE, shard=None) -> torch.Tensor:
    """Tokens, -9 where nothing changes; `given` are params, prompt and generated of each row."""
    shard = shard or Shard.of(logits.shape[1], ONE)
    edited = EditedDraws(len(given), MAX_LEN, shard, CPU)
    seqs = [
        sequence(*each, index, edited.edits_of(each[0], {3})) for index, each in enumerate(given)
    ]
    tokens = torch.full((len(given),), -9)
    packed = edited.pack(seqs, {})
    if packed is not None:
        part = logits[:, shard.start : shard.start + shard.size]
        edited.draw(part, packed, group, tokens)
    return tokens


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

    def on_rank(group: ParallelGroup) -> torch.Tensor:
        return draw(logits, rows, group, Shard.of_tiles(vocab, SAMPLE_TILE, group))

    expected = draw(logits, rows)
    assert (expected >= 0).sum() > 20
    for tokens in on_ranks(size, on_rank):
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
    changed = change(logits, params, prompt, generated, {3})
    expected = distribution(changed, params) * count
    counts = torch.bincount(drawn, minlength=20).double()
    assert counts[expected == 0].sum() == 0
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5 + 4 * (freedom > 0)


# ------------------------------------------------------------------ which requests pay


def test_options_that_change_nothing_are_no_edits():
    for params in (
        SamplingParams(),
        SamplingParams(0, min_p=0.5),
        SamplingParams(top_k=0, repetition_penalty=1, logit_bias={}),
    ):
        assert RequestEdits.of(params, {1, 2}, 10) is None


def test_a_batch_in_which_no_row_asks_packs_nothing():
    edited = EditedDraws(4, MAX_LEN, Shard.of(50, ONE), CPU)
    plain = sequence(SamplingParams(), [1, 2], [3], 0, None)
    params = SamplingParams(min_tokens=2)
    asking = sequence(params, [1, 2], [3], 1, edited.edits_of(params, {5}))
    over = sequence(params, [1, 2], [3, 4], 1, asking.edits)
    assert edited.pack([plain], {}) is None
    assert edited.pack([plain, over], {}) is None
    assert edited.pack([plain, asking], {}) is not None
    assert len(edited.asking) == 1
    del asking, over
    assert len(edited.asking) == 0  # so the next batch is not even looked at


def test_only_penalties_need_a_history():
    logits = torch.randn(2, 50)
    edited = EditedDraws(4, MAX_LEN, Shard.of(50, ONE), CPU)
    for options, width in (({"logit_bias": {4: 100.0}}, 0), ({"presence_penalty": 1}, 4)):
        params = SamplingParams(0, **options)
        seq = sequence(params, [1, 2], [3], 1, edited.edits_of(params, ()))
        edited.draw(logits, edited.pack([seq], {}), ONE, torch.zeros(1, dtype=torch.int64))
        assert edited.history.tokens.shape == (4, width)
