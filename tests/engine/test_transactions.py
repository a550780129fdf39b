"""A step is a transaction: whatever breaks it off, the engine goes on with the right tokens."""

import random
from contextlib import suppress

import pytest

from nanovllm import LLM
from nanovllm.engine.sequence import Sequence
from tests.engine.cases import (
    GREEDY,
    OPTIONS,
    PROMPTS,
    before_call,
    check_empty,
    drain,
    interrupt,
    said,
)
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
    ended = [len(victim.right[i]) < PARAMS[i].max_tokens for i in range(6)]
    assert ended == [True, False, False, False, True, False]  # by their stop texts


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
    with suppress(victim.error), InterruptAt(line, error=victim.error):
        engine.abort(ids[0])
    done = {output["request_id"]: output["token_ids"] for output in engine.step()} | drain(engine)
    assert [done[ids[i]] for i in (1, 2)] == [right[i] for i in (1, 2)]
    assert done.get(ids[0], right[0]) == right[0]  # it may not have come to it
    check_empty(engine)


# ------------------------------------------------------------------ the detokenizer


STORIES = ["Once upon a time", "Tom went to the", "The little fox"]
SHORT = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}  # they finish in the same step


def test_an_interrupt_of_the_detokenizer_costs_nothing(tiny, monkeypatch):
    outputs = tiny.generate(STORIES, use_tqdm=False, **SHORT)
    before_call(monkeypatch, tiny.tokenizer, "decode", 1, interrupt)
    ids, done, interrupts = [tiny.add_request(text, **SHORT) for text in STORIES], {}, 0
    while not tiny.is_finished():
        try:
            done |= {output["request_id"]: output for output in tiny.step()}
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 1
    assert said(done[i] for i in ids) == said(outputs)


# What the tokenizers' library raises where its own code, in Rust, panics; no Exception.
PANIC = type("PanicException", (BaseException,), {})


@pytest.mark.parametrize("error", [IndexError, PANIC])
def test_a_text_that_cannot_be_decoded_costs_no_other_request(tiny, monkeypatch, caplog, error):
    outputs = tiny.generate(STORIES, use_tqdm=False, **SHORT)
    bad, decode = outputs[1]["token_ids"], tiny.tokenizer.decode

    def fail(ids, **options):
        if ids == bad:
            raise error("no such piece")
        return decode(ids, **options)

    monkeypatch.setattr(tiny.tokenizer, "decode", fail)
    right = said(outputs)
    again = said(tiny.generate(STORIES, use_tqdm=False, **SHORT))
    assert again == [right[0], ("", bad, "error"), right[2]]
    assert f"its text cannot be decoded: {error.__name__}: no such piece" in caplog.text


# ------------------------------------------------------------------ the end


def test_an_interrupted_exit_can_be_repeated(directory, monkeypatch):
    engine = LLM(str(directory), **OPTIONS)
    runner = engine.model_runner
    before_call(monkeypatch, runner.step_runner, "close", 0, interrupt)
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


def test_an_abort_in_the_moment_in_which_a_request_ends_counts(shared, monkeypatch):
    """By a signal handler, which comes while the engine finds out that it has ended."""
    answers = []

    def is_full(seq):
        answers.append(shared.abort(seq.request_id))
        return True

    monkeypatch.setattr(Sequence, "is_full", property(is_full))
    shared.add_request(PROMPTS[0], max_tokens=1, ignore_eos=True)
    assert drain(shared) == {}
    assert answers == [True]
    check_empty(shared)
