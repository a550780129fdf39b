"""Several samples of a prompt: their order, their seeds, and the blocks that they share."""

import random
from dataclasses import replace

import pytest

from nanovllm import LLM, SamplingParams
from tests.engine.cases import (
    OPTIONS,
    PROMPTS,
    check_empty,
    count_computed,
    drain,
    in_order,
    scheduled,
    tokens,
    whatever_the_scheduler_does,
)

THREE = SamplingParams(n=3, seed=7, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def samples(shared) -> list[list[int]]:
    """Three of each prompt."""
    return tokens(shared.generate(PROMPTS, THREE, use_tqdm=False))


def test_samples_of_a_prompt_follow_each_other(llm, samples):
    params = [replace(THREE, n=n) for n in (2, 1, 3, 1)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    places = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0)]
    assert [(output["index"], output["sample"]) for output in outputs] == places
    assert [output["prompt_token_ids"] for output in outputs] == [PROMPTS[i] for i, _ in places]
    # A sample is the same however many there are.
    assert tokens(outputs) == [samples[3 * i + sample] for i, sample in places]


def test_each_sample_has_a_seed_of_its_own(llm, samples):
    assert len({tuple(ids) for ids in samples}) == 12
    (alone,) = llm.generate(PROMPTS[:1], replace(THREE, n=1), use_tqdm=False)
    assert alone["token_ids"] == samples[0]
    other = llm.generate(PROMPTS[:1], replace(THREE, seed=8), use_tqdm=False)
    assert not {tuple(ids) for ids in tokens(other)} & {tuple(ids) for ids in samples}
    unseeded = replace(THREE, seed=None, n=6, temperature=3)
    outputs = llm.generate(PROMPTS[:1], unseeded, use_tqdm=False)
    assert len({tuple(ids) for ids in tokens(outputs)}) == 6


@whatever_the_scheduler_does
def test_samples_are_the_same_whatever_the_scheduler_does(directory, samples, options):
    with scheduled(directory, options) as engine:
        assert tokens(engine.generate(PROMPTS, THREE, use_tqdm=False)) == samples
        outputs = engine.generate(PROMPTS[::-1], THREE, use_tqdm=False)
        assert tokens(outputs) == [ids for i in (9, 6, 3, 0) for ids in samples[i : i + 3]]


def fresh_prompt(length: int) -> list[int]:
    return random.Random(length).choices(range(2, 500), k=length)


@pytest.mark.parametrize(
    "options", [{}, {"async_scheduling": False}, {"max_num_batched_tokens": 24}]
)
@pytest.mark.parametrize("count", [1, 3])
def test_samples_share_the_blocks_of_their_prompt(directory, monkeypatch, options, count):
    """The whole blocks of 16 tokens but the one with the last token are computed once."""
    with LLM(str(directory), **{**OPTIONS, **options}) as engine:
        prompts = [fresh_prompt(length) for length in (40, 48, 33)[:count]]
        computed = count_computed(engine, monkeypatch)
        free = []
        step = engine._step
        blocks = engine.scheduler.blocks
        monkeypatch.setattr(engine, "_step", lambda: (step(), free.append(len(blocks.free))))
        params = replace(THREE, n=6, max_tokens=3)
        outputs = engine.generate(prompts, params, use_tqdm=False)
        assert len(outputs) == 6 * count
        assert sum(computed) == sum(
            len(prompt) + 5 * (len(prompt) - (len(prompt) - 1) // 16 * 16) for prompt in prompts
        )
        # All at a time: two shared blocks, and one or two of each sample's own.
        assert blocks.num_blocks - min(free) <= count * (2 + 6 * 2)
        check_empty(engine)


def test_without_the_prefix_cache_each_sample_is_computed(directory, monkeypatch):
    with LLM(str(directory), enable_prefix_caching=False, **OPTIONS) as engine:
        computed = count_computed(engine, monkeypatch)
        engine.generate([fresh_prompt(40)], THREE, use_tqdm=False)
        assert computed[0] == sum(computed) == 120


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_samples_do_not_wait_for_a_first_one_that_was_aborted(directory, samples, steps):
    """It reads its prompt in several steps."""
    prompt = fresh_prompt(40)
    with LLM(str(directory), max_num_batched_tokens=17, **OPTIONS) as engine:
        expected = tokens(engine.generate([prompt], THREE, use_tqdm=False))
        engine.generate([[5]] * 4, replace(THREE, n=1), use_tqdm=False)
        engine.scheduler.blocks.prefixes.clear()
        engine.scheduler.blocks.reset()
        stream = engine.stream([prompt, [5]], [THREE, replace(THREE, max_tokens=1, n=1)])
        first = engine.next_request_id
        added = engine.add_request([6], max_tokens=1, ignore_eos=True)
        step, counts = engine._step, iter(range(100))

        def stepping() -> None:
            if next(counts) == steps:
                engine.abort(added + 1)  # the first sample of the first prompt
            step()

        engine._step = stepping
        outputs = in_order(stream)
        assert first == added
        assert [output["finish_reason"] for output in outputs] == ["abort", *["length"] * 3]
        assert tokens(outputs)[1:3] == expected[1:]
        drain(engine)
        check_empty(engine)


def test_samples_of_an_added_request_have_the_ids_after_the_first(llm, samples):
    first = llm.add_request(PROMPTS[1], THREE)
    after = llm.add_request(PROMPTS[0], THREE)
    assert after == first + 3
    outputs = drain(llm)
    assert [outputs[first + i] for i in range(6)] == samples[3:6] + samples[:3]


def test_a_computed_request_has_one_sample(directory):
    message = r"^n=3 is not allowed with computed requests: .* 1$"
    options = {**OPTIONS, "enable_prefix_caching": False}
    with LLM(directory, **options) as engine, pytest.raises(ValueError, match=message):
        engine.add_computed_request(PROMPTS[0], THREE)
