"""Log-probabilities: transformers' own, whatever the scheduler does, and only where asked for."""

import random
from contextlib import suppress
from itertools import count
from typing import Any

import pytest

from nanovllm import LLM, Logprob, SamplingParams
from nanovllm.engine import draws
from nanovllm.engine.scoring import Scoring
from nanovllm.utils.joined import split
from tests.checkpoints import TABLE, Shape, prompts
from tests.engine.cases import (
    GREEDY,
    OPTIONS,
    PIPELINED,
    PROMPTS,
    check_empty,
    count_computed,
    steps,
    tokens,
)
from tests.interrupts import Interrupt, InterruptAt
from tests.scores import check_output, check_outputs

# As in test_engine_oracle.py: chunks, scarce blocks with preemption, micro-batches, no look-ahead.
SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 7},
    {"num_kvcache_blocks": 6, "max_num_batched_tokens": 13, "async_scheduling": False},
    {"num_kvcache_blocks": 8, "max_num_batched_tokens": 5, **PIPELINED},
    {"enable_prefix_caching": False, "num_kvcache_blocks": 6, **PIPELINED},
    {"max_num_seqs": 2, "pipeline_enable_profiling": True},
]
ASKED = [(None, None), (0, None), (None, 0), (5, None), (None, 3), (20, 20), (1, 7)]


@pytest.fixture(scope="module")
def model():
    return Shape(seed=5).build()  # that of `directory`


def random_params(rng: random.Random) -> tuple[SamplingParams, tuple[int | None, int | None]]:
    logprobs, prompt_logprobs = asked = rng.choice(ASKED)
    limit = rng.choice([{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5, "temperature": 3}])
    params = SamplingParams(
        max_tokens=rng.randint(1, 24), seed=rng.randrange(99), **limit,
        logprobs=logprobs, prompt_logprobs=prompt_logprobs,
    )  # fmt: skip
    return params, asked


@pytest.mark.parametrize("model_type", TABLE)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_log_probabilities_are_those_of_transformers(tmp_path, model_type, number):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    model = Shape.random(seed, model_type).write(tmp_path)
    given = prompts(seed, count=8)
    options = {**OPTIONS, "max_model_len": 128, **SETTINGS[number]}
    with LLM(str(tmp_path), **options) as llm:
        for _ in range(2):  # the second time prefixes are cached
            params, asked = zip(*(random_params(rng) for _ in given), strict=True)
            outputs = llm.generate(given, list(params), use_tqdm=False)
            check_outputs(model, given, outputs, asked)
        check_empty(llm)
        assert llm.scheduler.num_asking == 0


@pytest.mark.parametrize("more", [{}, PIPELINED])
def test_preempted_requests_keep_what_they_know(directory, model, monkeypatch, more):
    """Also one that was preempted within its prompt."""
    scored: list[int] = []  # tokens of prompts, in each step
    again: list[bool] = []
    of = Scoring.of

    def noting(step, vocab_size):
        found = of(step, vocab_size)
        again.extend(
            c.seq.scores_prompt and c.start < len(c.seq.prompt_logprobs) for c in step.chunks
        )
        scored.append(len(split(found.packed)[3]) if found else 0)
        return found

    monkeypatch.setattr(Scoring, "of", noting)
    given = prompts(1, count=9, longest=40)
    asking = SamplingParams(temperature=0, max_tokens=24, logprobs=2, prompt_logprobs=1)
    options = {**OPTIONS, "num_kvcache_blocks": 8, "max_num_batched_tokens": 2, **more}
    with LLM(str(directory), **options) as llm:
        outputs = llm.generate(given, asking, use_tqdm=False)
    assert any(again)
    check_outputs(model, given, outputs, [(2, 1)] * len(given))
    # Each token of a prompt is scored once, whatever is computed again.
    assert sum(scored) == sum(len(prompt) - 1 for prompt in given)


def test_long_prompts_are_scored_in_pieces(llm, model, monkeypatch):
    monkeypatch.setattr(draws, "MOST_ROWS", 4)
    monkeypatch.setattr(draws, "PROMPT_ROWS", 3)
    outputs = llm.generate(PROMPTS * 2, GREEDY_SCORED, use_tqdm=False)
    check_outputs(model, PROMPTS * 2, outputs, [(2, 1)] * len(outputs))


GREEDY_SCORED = SamplingParams(
    temperature=0, max_tokens=8, ignore_eos=True, logprobs=2, prompt_logprobs=1
)


def test_asking_changes_no_token_and_greedy_ones_are_the_likeliest(llm, expected):
    outputs = llm.generate(PROMPTS, GREEDY_SCORED, use_tqdm=False)
    assert tokens(outputs) == expected
    for output in outputs:
        ranks = [
            place[t].rank for t, place in zip(output["token_ids"], output["logprobs"], strict=True)
        ]
        assert ranks == [1] * 8


def test_a_scored_prompt_takes_no_cached_prefix_but_leaves_one(directory, model, monkeypatch):
    prompt = (PROMPTS[0] * 40)[:40]
    once = SamplingParams(max_tokens=1, prompt_logprobs=2)
    with LLM(str(directory), **OPTIONS) as llm:
        counts = count_computed(llm, monkeypatch)
        for params in (once, SamplingParams(max_tokens=1), once):
            (output,) = llm.generate([prompt], params, use_tqdm=False)
            check_output(model, prompt, output, (None, params.prompt_logprobs))
    assert counts == [40, 8, 40]  # two blocks of 16 are found


def test_only_rows_that_ask_are_scored(llm, monkeypatch):
    scored: list[tuple[int, int]] = []
    score = draws.score

    def counting(logits, tokens, count, *group):
        scored.append((len(logits), count))
        return score(logits, tokens, count, *group)

    monkeypatch.setattr(draws, "score", counting)
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert scored == []
    asking = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, logprobs=4)
    llm.generate(PROMPTS, [GREEDY, asking, GREEDY, GREEDY], use_tqdm=False)
    assert set(scored) == {(1, 4)}


# ------------------------------------------------------------------ aborts, errors, interrupts


@pytest.mark.parametrize("moment", ["begin", "issued", "tokens"])
def test_what_is_aborted_has_a_score_for_each_of_its_tokens(directory, model, monkeypatch, moment):
    prompt, lengths = (PROMPTS[0] * 20)[:20], set()
    with LLM(str(directory), **OPTIONS, max_num_batched_tokens=8) as llm:
        for number in range(8):
            moments = count(1)

            def watch(now, step, number=number, moments=moments):
                if now == moment and next(moments) > number:
                    llm.abort(llm.next_request_id - 1)

            monkeypatch.setattr(llm.model_runner, "watch", watch)
            (output,) = llm.generate([prompt], GREEDY_SCORED, use_tqdm=False)
            assert output["finish_reason"] == "abort"
            known = prompt[: len(output["prompt_logprobs"])]
            lengths |= {(len(known), len(output["token_ids"]))}
            assert len(known) == len(prompt) or not output["token_ids"]
            check_output(model, prompt[: len(known)], output, (2, 1))
        check_empty(llm)
    assert len(lengths) > 4


def test_interrupts_neither_lose_nor_double_scores(directory, model):
    """At random lines of the engine, with few blocks, so that requests are preempted as well."""
    options = {**OPTIONS, "num_kvcache_blocks": 5, "max_num_batched_tokens": 24}
    asked = [(1, None), (None, 2), (0, 0), (3, 1)]
    params = [
        SamplingParams(temperature=0, max_tokens=12, logprobs=a, prompt_logprobs=b)
        for a, b in asked
    ]
    draw = random.Random()
    with LLM(str(directory), **options) as llm:
        with InterruptAt(0) as lines:
            llm.generate(PROMPTS, params, use_tqdm=False)
        assert llm.scheduler.num_preemptions > 0
        for _ in range(10):
            ids = [llm.add_request(*pair) for pair in zip(PROMPTS, params, strict=True)]
            outputs: dict[int, Any] = {}
            with suppress(Interrupt), InterruptAt(draw.randrange(1, lines.executed)):
                for output in steps(llm):
                    outputs[output["request_id"]] = output
            outputs |= {output["request_id"]: output for output in steps(llm)}
            check_outputs(model, PROMPTS, [outputs[i] for i in ids], asked)
        check_empty(llm)
        assert llm.scheduler.num_asking == 0


# ------------------------------------------------------------------ texts


def test_each_token_has_its_own_text(tiny):
    (output,) = tiny.generate(
        "Once upon", temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=0, use_tqdm=False
    )
    for place in [*output["logprobs"], *output["prompt_logprobs"][1:]]:
        for token, each in place.items():
            assert each.decoded_token == tiny.tokenizer.decode([token])
    own = [
        place[t].decoded_token
        for t, place in zip(output["token_ids"], output["logprobs"], strict=True)
    ]
    assert "".join(own) == output["text"]


def test_without_a_tokenizer_tokens_have_no_text(llm):
    (output,) = llm.generate([[5, 6]], max_tokens=1, prompt_logprobs=0, use_tqdm=False)
    none, place = output["prompt_logprobs"]
    assert none is None
    assert place == {6: Logprob(place[6].logprob, place[6].rank, None)}


def test_a_token_whose_text_cannot_be_told_ends_its_own_request_in_error(tiny, monkeypatch):
    tiny.texts.token_texts.clear()

    decode = tiny.tokenizer.decode

    def fail_at_single_tokens(ids, *, skip_special_tokens, **options):
        if not skip_special_tokens:
            raise IndexError("no such piece")
        return decode(ids, skip_special_tokens=skip_special_tokens, **options)

    monkeypatch.setattr(tiny.tokenizer, "decode", fail_at_single_tokens)
    asking = SamplingParams(max_tokens=2, logprobs=1)
    outputs = tiny.generate(["Tom", "Anna"], [asking, GREEDY], use_tqdm=False)
    assert [output["finish_reason"] for output in outputs] == ["error", "length"]


def test_a_computed_request_has_no_scores_of_its_prompt(directory):
    with (
        LLM(str(directory), **OPTIONS, enable_prefix_caching=False) as llm,
        pytest.raises(ValueError, match=r"^prompt_logprobs=3 is not allowed"),
    ):
        llm.add_computed_request([5, 6, 7], prompt_logprobs=3)
