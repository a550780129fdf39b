"""Completions and deltas as they come, and streams that are broken off."""

import gc
import random
from collections import defaultdict
from dataclasses import replace
from itertools import cycle

import pytest

from nanovllm import LLM
from tests.engine.cases import (
    GREEDY,
    OPTIONS,
    PROMPTS,
    before_call,
    check_empty,
    in_child,
    in_order,
    said,
    scheduled,
    tokens,
    whatever_the_scheduler_does,
)
from tests.thread_rounds import run_all

LONG = replace(GREEDY, max_tokens=24)


@pytest.fixture(scope="module")
def params(speaker) -> list:
    """With and without stop texts that are there, and with samples."""
    outputs = speaker.generate(PROMPTS, LONG, use_tqdm=False)
    stops = [output["text"][-9:-5] for output in outputs]
    return [
        replace(LONG, stop=stops[0]),
        replace(LONG, n=3, seed=3, temperature=1.0),
        replace(LONG, stop=[stops[2], "nowhere"], include_stop_str_in_output=True),
        replace(LONG, stop=[stops[3], "x"], max_tokens=3),
    ]


@pytest.fixture(scope="module")
def whole(speaker, params) -> list[dict]:
    return speaker.generate(PROMPTS, params, use_tqdm=False)


def joined(deltas) -> list[tuple[str, list[int], str]]:
    """What deltas make together, for each completion."""
    texts, ids, reasons = defaultdict(str), defaultdict(list), {}
    for delta in deltas:
        place = delta["index"], delta["sample"]
        assert place not in reasons
        assert delta["text"] or delta["finish_reason"]
        texts[place] += delta["text"]
        ids[place] += delta["token_ids"]
        if delta["finish_reason"] is not None:
            reasons[place] = delta["finish_reason"]
    return [(texts[place], ids[place], reasons[place]) for place in sorted(reasons)]


def test_completions_come_when_they_end(spoken, params, whole):
    outputs = list(spoken.stream(PROMPTS, params))
    assert said(in_order(outputs)) == said(whole)
    ends = [output["end_time"] for output in outputs]
    assert ends == sorted(ends)
    lengths = [len(output["token_ids"]) for output in outputs]
    assert lengths == sorted(lengths)  # they began together
    assert list(spoken.stream([])) == list(spoken.stream([], deltas=True)) == []


@whatever_the_scheduler_does
def test_deltas_make_exactly_the_texts(speaking, params, whole, options):
    with scheduled(speaking, options) as engine:
        deltas = list(engine.stream(PROMPTS, params, deltas=True))
        assert joined(deltas) == said(whole)
        assert len(deltas) > 30


def test_deltas_of_a_real_text_are_tokens(tiny):
    text = "Once upon a time"
    options = {"temperature": 0, "max_tokens": 60}
    deltas = list(tiny.stream(text, **options, deltas=True))
    (output,) = tiny.generate(text, **options, use_tqdm=False)
    assert joined(deltas) == said([output])
    assert len(deltas) > 55


def test_nothing_runs_before_the_first_is_asked_for(spoken):
    stream = spoken.stream(PROMPTS, LONG)
    assert spoken.is_finished()
    stream.close()
    assert list(stream) == []
    with pytest.raises(ValueError, match=r"^prompts\[1\] is empty"):  # but it is checked
        spoken.stream([[1], []])
    with pytest.raises(TypeError, match="max_token"):
        spoken.stream([[1]], max_token=5)


@pytest.mark.parametrize("deltas", [False, True])
def test_a_stream_that_is_broken_off_leaves_nothing(spoken, params, whole, deltas):
    count = len(list(spoken.stream(PROMPTS, params, deltas=deltas)))
    ways = cycle(["break", "error", "close", "throw", "garbage"])
    numbers = range(random.randint(1, 6), count + 1, 6) if deltas else range(1, count + 1)
    for number in numbers:
        break_off(spoken.stream(PROMPTS, params, deltas=deltas), number, next(ways))
        gc.collect()
        assert spoken.is_finished()
        check_empty(spoken)
    assert said(spoken.generate(PROMPTS, params, use_tqdm=False)) == said(whole)


def break_off(stream, number: int, how: str) -> None:
    """After so many items."""
    if how in ("break", "error"):
        try:
            for i, _ in enumerate(stream, 1):
                if i == number:
                    if how == "break":
                        break
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        return
    for _ in range(number):
        next(stream)
    if how == "close":
        stream.close()
    elif how == "throw":
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt)
    else:
        ring = [stream]
        ring.append(ring)


@pytest.mark.parametrize("method", ["launch", "collect"])
@pytest.mark.parametrize("after", [0, 2, 6])
def test_it_may_be_closed_in_the_middle_of_a_step(spoken, monkeypatch, method, after):
    """By the collection of garbage or a signal handler, which interrupt whatever runs."""
    expected = spoken.generate(PROMPTS, LONG, use_tqdm=False)
    stream = spoken.stream(PROMPTS[::-1], LONG, deltas=True)
    next(stream)
    before_call(monkeypatch, spoken.model_runner, method, after, stream.close)
    assert said(spoken.generate(PROMPTS, LONG, use_tqdm=False)) == said(expected)
    spoken.step()  # what was closed within the last step goes with the next
    check_empty(spoken)


def test_requests_of_others_go_on_while_a_stream_waits(spoken, whole, params):
    expected = tokens(spoken.generate(PROMPTS, LONG, use_tqdm=False))
    stream = spoken.stream(PROMPTS, params)
    first = next(stream)
    assert tokens(spoken.generate(PROMPTS, LONG, use_tqdm=False)) == expected
    assert said(in_order([first, *stream])) == said(whole)


def test_an_aborted_request_is_an_item_like_others(spoken):
    expected = spoken.generate(PROMPTS, LONG, use_tqdm=False)
    stream = spoken.stream(PROMPTS, LONG, deltas=True)
    deltas = [next(stream) for _ in range(9)]
    assert spoken.abort(max(spoken.requests))
    found = joined([*deltas, *stream])
    assert found[:3] == said(expected)[:3]
    text, ids, reason = found[3]
    assert reason == "abort"
    assert (text, ids) == (spoken.tokenizer.decode(ids), expected[3]["token_ids"][: len(ids)])


def test_a_stream_ends_with_the_engine(speaking):
    engine = LLM(speaking, **OPTIONS)
    stream = engine.stream(PROMPTS, LONG, deltas=True)
    next(stream)
    engine.exit()
    with pytest.raises(RuntimeError, match="exited"):
        list(stream)


def test_without_a_tokenizer_there_are_no_deltas(llm):
    with pytest.raises(ValueError, match=r"^stop and deltas are not allowed: .*no tokenizer"):
        llm.stream(PROMPTS, deltas=True)
    outputs = in_order(llm.stream(PROMPTS, GREEDY))
    assert said(outputs) == said(llm.generate(PROMPTS, GREEDY, use_tqdm=False))


@pytest.mark.parametrize("blocks", [64, 5])
def test_threads_stream_generate_and_break_off_at_a_time(speaking, params, whole, blocks):
    draw = random.Random(seed := random.randrange(10**6))
    print("seed", seed)
    with LLM(speaking, **OPTIONS, num_kvcache_blocks=blocks, max_num_seqs=6) as engine:

        def stream() -> None:
            assert said(in_order(engine.stream(PROMPTS, params))) == said(whole)

        def deltas() -> None:
            assert joined(engine.stream(PROMPTS, params, deltas=True)) == said(whole)

        def generate() -> None:
            assert said(engine.generate(PROMPTS, params, use_tqdm=False)) == said(whole)

        def leave() -> None:
            for deltas in (True, False):
                for i, _ in enumerate(engine.stream(PROMPTS, params, deltas=deltas)):
                    if i == 2:
                        break

        for _ in range(2):
            run_all(*draw.choices([stream, deltas, generate, leave], k=4))
            check_empty(engine)


def test_a_forked_child_leaves_its_parents_stream_alone(speaking, whole, params):
    with LLM(speaking, **OPTIONS) as engine:
        stream = engine.stream(PROMPTS, params)
        first = next(stream)
        assert in_child(stream.close) == 0
        assert said(in_order([first, *stream])) == said(whole)
