"""A step is a transaction: whatever breaks it off, the engine goes on with the right tokens."""

from __future__ import annotations

import random

import pytest

from nanovllm import LLM
from tests.engine.cases import GREEDY, OPTIONS, PROMPTS, check_empty, drain
from tests.interrupts import PARAMS, Interrupt, InterruptAt, Play, Victim, write_model
from tests.interrupts import PROMPTS as PLAY


@pytest.fixture(scope="module", params=[Interrupt, RuntimeError], ids=["interrupt", "error"])
def victim(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    write_model(directory)
    victim = Victim(str(directory), request.param)
    yield victim
    victim.engine.exit()


def test_the_play_meets_what_it_is_to_meet(victim):
    """Otherwise breaking it off would prove little."""
    before = victim.engine.scheduler.num_preemptions
    assert Play(victim.engine).run() == victim.right
    assert victim.engine.scheduler.num_preemptions > before


def test_an_engine_survives_at_whatever_line_it_is_broken_off(victim):
    draw = random.Random()
    seed = draw.randrange(10**6)
    draw.seed(seed)
    for _ in range(40):
        line = draw.randrange(1, victim.lines)
        assert victim.break_off(line) in ("right", None), f"line {line}, seed {seed}"


@pytest.mark.parametrize("line", range(1, 60))
def test_an_abort_that_is_interrupted_holds_up_no_other_request(victim, line):
    engine, right = victim.engine, victim.right
    ids = [engine.add_request(PLAY[i], PARAMS[i]) for i in range(3)]
    engine.step()
    try:
        with InterruptAt(line, error=victim.error):
            engine.abort(ids[0])
    except victim.error:
        pass
    said = {output["request_id"]: output["token_ids"] for output in engine.step()} | drain(engine)
    assert [said[ids[i]] for i in (1, 2)] == [right[i] for i in (1, 2)]
    assert said.get(ids[0], right[0]) == right[0]  # it may not have come to it
    check_empty(engine)


# ------------------------------------------------------------------ the detokenizer


@pytest.fixture
def stories(tiny, monkeypatch):
    """Adds three requests of one length, which finish in one step, and tells their completions.

    `fails` is called with the tokens of each text, and may raise instead of the tokenizer.
    """
    params = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    texts = ["Once upon a time", "Tom went to the", "The little fox"]
    outputs = tiny.generate(texts, use_tqdm=False, **params)

    def add(fails):
        def decode(ids, **options):
            fails(ids)
            return original(ids, **options)

        original = tiny.tokenizer.decode
        monkeypatch.setattr(tiny.tokenizer, "decode", decode)
        return [tiny.add_request(text, **params) for text in texts]

    return tiny, add, outputs


def completions(engine) -> tuple[dict, int]:
    """Of all requests by id, and how often a step was interrupted."""
    said, interrupts = {}, 0
    while not engine.is_finished():
        try:
            said |= {output.pop("request_id"): output for output in engine.step()}
        except KeyboardInterrupt:
            interrupts += 1
    return said, interrupts


def test_an_interrupt_of_the_detokenizer_costs_nothing(stories):
    engine, add, outputs = stories
    calls = iter(range(1000))

    def interrupt(ids):
        if next(calls) == 1:
            raise KeyboardInterrupt

    ids = add(interrupt)
    said, interrupts = completions(engine)
    assert interrupts == 1
    assert [said[i] for i in ids] == outputs


def test_a_text_that_cannot_be_decoded_costs_no_other_request(stories, caplog):
    engine, add, outputs = stories
    bad = outputs[1]["token_ids"]

    def fail(ids):
        if ids == bad:
            raise IndexError("no such piece")

    ids = add(fail)
    said, _ = completions(engine)
    failed = {"text": "", "token_ids": bad, "finish_reason": "error"}
    assert [said[i] for i in ids] == [outputs[0], failed, outputs[2]]
    assert f"Request {ids[1]}" in caplog.text
    assert "no such piece" in caplog.text


# ------------------------------------------------------------------ the end


def test_an_interrupted_exit_can_be_repeated(directory, monkeypatch):
    engine = LLM(str(directory), **OPTIONS)
    runner = engine.model_runner
    calls = iter(range(10))
    close = runner.step_runner.close

    def interrupted():
        if next(calls) == 0:
            raise KeyboardInterrupt
        close()

    monkeypatch.setattr(runner.step_runner, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.exit()
    assert not runner.closed
    with pytest.raises(RuntimeError, match="exited"):
        engine.add_request([1])
    engine.exit()
    assert runner.closed


def test_nothing_is_left_to_wait_for_once_an_engine_has_exited(directory):
    engine = LLM(str(directory), **OPTIONS)
    request = engine.add_request(PROMPTS[0], GREEDY)
    engine.step()
    engine.exit()
    assert engine.is_finished()
    assert engine.abort(request) is False
