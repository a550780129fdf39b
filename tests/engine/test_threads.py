"""Calls from several threads, and from processes that were forked."""

import os
import random
import threading
import time
from dataclasses import replace

import pytest

from nanovllm import LLM
from tests.engine.cases import GREEDY, OPTIONS, PROMPTS, before_call, drain, in_child, tokens
from tests.thread_rounds import PATIENCE, Round, run_all


def test_threads_share_one_batch(llm, expected, monkeypatch):
    """Two calls of generate take hardly more steps than one."""
    steps = []
    launch = llm.model_runner.launch
    monkeypatch.setattr(
        llm.model_runner,
        "launch",
        lambda step, *options: (steps.append(step), launch(step, *options))[1],
    )
    meet = threading.Barrier(2)

    def generate() -> None:
        meet.wait()
        outputs = llm.generate(PROMPTS, replace(GREEDY, max_tokens=30), use_tqdm=False)
        assert [ids[:8] for ids in tokens(outputs)] == expected

    for _ in range(20):
        run_all(generate, generate)
        if max(len(step.chunks) for step in steps) > len(PROMPTS):
            return
        # A busy machine may run one thread to its end before the other.
    raise AssertionError("no step had requests of both")


@pytest.mark.parametrize("blocks", [64, 5])
def test_whatever_threads_do_all_tokens_are_right(directory, expected, blocks):
    seed = random.randrange(10**6)
    print("seed", seed)
    with LLM(str(directory), **OPTIONS, num_kvcache_blocks=blocks, max_num_seqs=6) as engine:
        draw = random.Random(seed)
        for _ in range(10):
            Round(engine, expected, draw).run()


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_abort_from_within_a_step_ends_a_request_of_a_running_generate(
    llm, expected, monkeypatch, where
):
    def abort():
        assert llm.abort(sorted(llm.requests)[1])

    before_call(monkeypatch, llm.model_runner, where, 3, abort)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [o["finish_reason"] for o in outputs] == ["length", "abort", "length", "length"]
    assert [tokens(outputs)[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    got = outputs[1]["token_ids"]
    assert got == expected[1][: len(got)]


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_from_within_a_step_nothing_new_is_queued_or_run(llm, expected, monkeypatch, where):
    """As a signal handler may try; the step would go on with requests as they were before."""
    stream = llm.stream(PROMPTS, [replace(GREEDY, max_tokens=1), *[GREEDY] * 3])
    next(stream)
    calls = [
        lambda: llm.generate([[1]], GREEDY, use_tqdm=False),
        lambda: llm.add_request([1], GREEDY),
        llm.step,
        lambda: next(stream),
    ]
    for call in calls:

        def refused(call=call):
            with pytest.raises(RuntimeError, match="in the middle of a call"):
                call()

        before_call(monkeypatch, llm.model_runner, where, 3, refused)
        assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize("where", ["launch", "collect"])
def test_exit_from_within_a_step_ends_the_call_that_it_came_in(directory, monkeypatch, where):
    engine = LLM(str(directory), **OPTIONS)
    before_call(monkeypatch, engine.model_runner, where, 3, engine.exit)
    with pytest.raises(RuntimeError, match="has exited"):
        engine.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_exit_waits_for_a_step_that_another_thread_runs(directory, monkeypatch):
    engine = LLM(str(directory), **OPTIONS)
    inside = threading.Event()

    def linger():
        inside.set()
        time.sleep(0.2)
        assert not engine.model_runner.closed

    before_call(monkeypatch, engine.model_runner, "collect", 0, linger)

    def generate_on() -> None:
        while True:  # on a busy machine a call may have ended before the other thread goes on
            engine.generate(PROMPTS, GREEDY, use_tqdm=False)

    def generate() -> None:
        with pytest.raises(RuntimeError, match="exited"):
            generate_on()

    def leave() -> None:
        inside.wait(PATIENCE)
        engine.exit()
        assert engine.model_runner.closed

    run_all(generate, leave)


def test_steps_do_not_wait_for_a_thread_that_encodes(spoken, monkeypatch):
    """Or neither would go on where that thread waits for a step, as a signal handler may."""

    def stream() -> None:
        options = replace(GREEDY, stop=["no such text"])
        assert list(spoken.stream([PROMPTS[0]], options, deltas=True))

    before_call(monkeypatch, spoken.tokenizer, "encode", 0, lambda: run_all(stream))
    spoken.generate("Once", GREEDY, use_tqdm=False)


# ------------------------------------------------------------------ fork


def test_a_forked_child_touches_nothing_of_its_parents(directory, expected, monkeypatch):
    engine = LLM(str(directory), **OPTIONS)
    request = engine.add_request(PROMPTS[0], GREEDY)
    engine.step()

    def refuse() -> None:
        os._exit(3)

    def child() -> None:
        engine.model_runner.close = refuse
        engine.exit()
        for use in (engine.step, lambda: engine.generate(PROMPTS), lambda: engine.add_request([1])):
            with pytest.raises(RuntimeError, match=f"process {os.getppid()}"):
                use()

    assert in_child(child) == 0
    assert in_child(lambda: engine._finalizer()) == 0  # as garbage collection and exit do
    assert drain(engine) == {request: expected[0]}
    engine.exit()


def test_a_child_that_was_forked_during_a_step_does_not_hang(directory):
    engine = LLM(str(directory), **OPTIONS)
    with engine.transactions.lock:  # as another thread may hold it
        status: list[int] = []
        run_all(lambda: status.append(in_child(engine.exit)))
    assert status == [0]
    engine.exit()
