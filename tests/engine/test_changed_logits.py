"""Requests that change their logits: the tokens of a plain loop, whatever the engine does."""

import math
import random
from dataclasses import replace

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine import draws
from tests.checkpoints import VOCAB, Shape, prompts
from tests.close_draws import CLOSE, counting_close_draws
from tests.engine.cases import (
    GREEDY,
    OPTIONS,
    PROMPTS,
    before_call,
    drain,
    interrupt,
    scheduled,
    tokens,
    whatever_the_scheduler_does,
)
from tests.logit_oracle import CloseCallError, greedy, random_changes

MORE = prompts(4, count=12, longest=30)
EOS = 1  # of the checkpoint


@pytest.fixture(scope="module")
def cases() -> list[tuple[SamplingParams, list[int]]]:
    """One request that changes nothing among some that do; the tokens of each by transformers.

    It reads the whole text anew for every token.
    """
    rng, model = random.Random(), Shape(seed=5).build()
    changes = [
        {},
        {"repetition_penalty": 1.5},
        {"frequency_penalty": 1.5, "presence_penalty": -2},
        # The likeliest token, if nothing forbade it.
        {"min_tokens": 4, "logit_bias": {EOS: 1000}},
        {"min_tokens": 3, "stop_token_ids": [7], "logit_bias": {7: 1000}, "ignore_eos": True},
        *[None] * 7,  # random ones
    ]

    def case(prompt: list[int], change: dict | None) -> tuple[SamplingParams, list[int]]:
        # Those that are not random are long enough to fill any cache here.
        options = random_changes(rng, VOCAB) if change is None else change
        most = rng.randint(9, 24) if change is None else 24
        params = SamplingParams(temperature=0, max_tokens=most, **options)
        try:
            return params, greedy(model, prompt, params, {EOS}, least_lead=CLOSE)
        except CloseCallError:
            return case(prompt, change)

    return [*map(case, MORE, changes)]


@pytest.fixture(scope="module")
def params(cases) -> list[SamplingParams]:
    return [params for params, _ in cases]


@pytest.fixture(scope="module")
def right(cases) -> list[list[int]]:
    return [tokens for _, tokens in cases]


def test_the_cases_tell_right_from_wrong(shared, params, right):
    """Most options change the text; those of min_tokens end it just when it may end."""
    plain = [replace(GREEDY, max_tokens=each.max_tokens) for each in params]
    unchanged = tokens(shared.generate(MORE, plain, use_tqdm=False))
    assert sum(ours != theirs for ours, theirs in zip(right, unchanged, strict=True)) > 4
    assert [len(ids) for ids in right[3:5]] == [5, 4]


@pytest.mark.parametrize("more", [{"temperature": 0}, {"temperature": 1}, {"frequency_penalty": 1}])
def test_a_request_that_allows_no_token_ends_in_error(llm, caplog, more):
    asked = {"logit_bias": dict.fromkeys(range(VOCAB), -math.inf), "logprobs": 2}
    params = SamplingParams(**asked, **more, prompt_logprobs=2, n=2)
    outputs = llm.generate([MORE[0], MORE[1]], [params, GREEDY], use_tqdm=False)
    assert [output["finish_reason"] for output in outputs] == ["error", "error", "length"]
    assert [output["token_ids"] for output in outputs[:2]] == [[], []]
    assert [output["logprobs"] for output in outputs[:2]] == [[], []]
    assert sum("no token is allowed" in record.getMessage() for record in caplog.records) == 2


@whatever_the_scheduler_does
def test_greedy_tokens_are_those_of_a_plain_loop(directory, params, right, options, monkeypatch):
    """Twice, so that the second time prompts begin in the prefix cache."""
    monkeypatch.setattr(draws, "MOST_ROWS", random.choice([1, 3, 64]))
    with scheduled(directory, options) as engine:
        assert tokens(engine.generate(MORE, params, use_tqdm=False)) == right
        assert tokens(engine.generate(MORE[::-1], params[::-1], use_tqdm=False)) == right[::-1]


def test_a_seed_gives_the_same_tokens_whatever_else_is_going_on(directory, shared):
    rng = random.Random()

    def drawn(seed: int) -> tuple[SamplingParams, list[int]]:
        # Of a fixed length, so that a small cache overflows.
        changes = random_changes(rng, VOCAB) | {"max_tokens": 20, "ignore_eos": True}
        params = SamplingParams(0.8, top_k=40, seed=seed, **changes)
        with counting_close_draws() as close:
            outputs = shared.generate([MORE[seed]], params, use_tqdm=False)
        return drawn(seed) if any(close) else (params, *tokens(outputs))

    params, alone = map(list, zip(*map(drawn, range(len(MORE))), strict=True))
    for options in ({}, {"num_kvcache_blocks": 5, "max_num_batched_tokens": 20}):
        with scheduled(directory, options) as engine:
            fixed = {"max_tokens": 9, "ignore_eos": True}
            others = [SamplingParams(**fixed), SamplingParams(2, presence_penalty=1, **fixed)]
            outputs = engine.generate(PROMPTS[:2] + MORE, others + params, use_tqdm=False)
            assert tokens(outputs)[2:] == alone


@pytest.mark.parametrize("number", [0, 1, 4, 9])
@pytest.mark.parametrize("method", ["launch", "collect", "sampler.draw"])
def test_tokens_are_right_after_an_interrupt(directory, params, right, method, number, monkeypatch):
    """Before a step, after it, and within it; another request then takes the first slot."""
    with LLM(str(directory), **OPTIONS, max_num_seqs=4, num_kvcache_blocks=8) as engine:
        ids = [engine.add_request(*pair) for pair in zip(MORE, params, strict=True)]
        owner, *names = engine.model_runner, *method.split(".")
        for name in names[:-1]:
            owner = getattr(owner, name)
        before_call(monkeypatch, owner, names[-1], number, interrupt)
        found: dict[int, list[int]] = {}

        def step_on() -> None:
            while True:
                found.update({out["request_id"]: out["token_ids"] for out in engine.step()})

        with pytest.raises(KeyboardInterrupt):
            step_on()
        monkeypatch.undo()
        engine.abort(ids[0])
        found |= drain(engine)
        assert {i: found[i] for i in ids[1:]} == dict(zip(ids[1:], right[1:], strict=True))


def test_an_aborted_request_leaves_nothing_to_its_successor(directory, params, right):
    """Which gets its slot, and at first has fewer tokens."""
    with LLM(str(directory), **OPTIONS, max_num_seqs=1) as engine:
        for index in (1, 2, 5, 6, 7):
            dropped = engine.add_request([9] * 40, presence_penalty=2, max_tokens=20)
            for _ in range(random.randint(1, 9)):
                engine.step()
            engine.abort(dropped)
            request = engine.add_request(MORE[index], params[index])
            assert drain(engine)[request] == right[index]
