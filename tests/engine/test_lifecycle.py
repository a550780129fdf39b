"""Interrupts, failed steps, exits, and several engines in one process."""

import shutil
from pathlib import Path

import pytest

from nanovllm import LLM
from tests.checkpoints import Shape
from tests.engine.cases import GREEDY, OPTIONS, PROMPTS, before_call, check_empty, drain, tokens


@pytest.mark.parametrize("method", ["launch", "collect"])
@pytest.mark.parametrize("after", [0, 1, 5])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_generate_leaves_nothing_behind(
    llm, expected, monkeypatch, method, after, error
):
    def fail():
        raise error("pulled the plug")

    before = llm.add_request(PROMPTS[0], GREEDY)
    before_call(monkeypatch, llm.model_runner, method, after, fail)
    with pytest.raises(error, match="pulled the plug"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert list(llm.requests) == [before]
    # What was there before the call goes on, and later calls are unharmed.
    assert drain(llm) == {before: expected[0]}
    check_empty(llm)
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_step_that_failed_can_be_repeated(llm, expected, monkeypatch):
    ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
    original = llm.model_runner.collect
    calls = iter(range(1000))

    def fails_every_other_time(launched):
        if next(calls) % 2 == 0:
            raise MemoryError
        return original(launched)

    monkeypatch.setattr(llm.model_runner, "collect", fails_every_other_time)
    outputs, failures = {}, 0
    while not llm.is_finished():
        try:
            outputs.update({out["request_id"]: out["token_ids"] for out in llm.step()})
        except MemoryError:
            failures += 1
    assert failures > 5
    assert [outputs[i] for i in ids] == expected


def test_exit_twice_is_fine_and_use_after_it_is_an_error(directory):
    with pytest.raises(ZeroDivisionError), LLM(str(directory), **OPTIONS) as engine:
        engine.add_request([1 // 0])
    engine.exit()
    uses = [
        lambda: engine.generate(PROMPTS, use_tqdm=False),
        lambda: engine.add_request(PROMPTS[0]),
        lambda: engine.step(),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match="engine has exited"):
            use()


def test_two_engines_at_once_do_not_disturb_each_other(directory, tmp_path, llm, expected):
    Shape(seed=6, layers=1).write(tmp_path)
    with LLM(str(tmp_path), **OPTIONS) as other, LLM(str(directory), **OPTIONS) as same:
        alone = tokens(other.generate(PROMPTS, GREEDY, use_tqdm=False))
        assert alone != expected
        engines = [llm, other, same]
        ids = [[engine.add_request(p, GREEDY) for p in PROMPTS] for engine in engines]
        outputs = [{}, {}, {}]
        while not all(engine.is_finished() for engine in engines):
            for n, engine in enumerate(engines):
                outputs[n].update({o["request_id"]: o["token_ids"] for o in engine.step()})
        said = [[outputs[n][i] for i in ids[n]] for n in range(3)]
        assert said == [expected, alone, expected]


def test_an_engine_that_could_not_start_leaves_room_for_the_next(directory, tmp_path, expected):
    copy = Path(shutil.copytree(directory, tmp_path / "model"))
    (copy / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="truncated or damaged"):
        LLM(str(copy), **OPTIONS)
    with LLM(str(directory), **OPTIONS) as engine:
        assert tokens(engine.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected
