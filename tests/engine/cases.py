"""What the tests of the engine share: options, prompts, and what an idle engine looks like."""

from __future__ import annotations

from nanovllm import SamplingParams
from tests.checkpoints import prompts

OPTIONS = {"device": "cpu", "max_model_len": 64, "kvcache_block_size": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = prompts(3, count=4, longest=30)


def check_empty(engine) -> None:
    assert engine.requests == {}
    assert engine.scheduler.is_idle
    assert len(engine.scheduler.blocks.free) == engine.scheduler.blocks.num_blocks


def tokens(outputs) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


def said(outputs) -> list[tuple[str, list[int], str]]:
    """What does not vary from one run to the next."""
    return [(output["text"], output["token_ids"], output["finish_reason"]) for output in outputs]


def drain(engine) -> dict[int, list[int]]:
    outputs = {}
    while not engine.is_finished():
        for output in engine.step():
            outputs[output["request_id"]] = output["token_ids"]
    return outputs


def before_call(monkeypatch, owner, name: str, number: int, action) -> None:
    """Lets `action` be called before call `number`, from 0, of a method."""
    original, calls = getattr(owner, name), iter(range(10**6))

    def method(*args, **options):
        if next(calls) == number:
            action()
        return original(*args, **options)

    monkeypatch.setattr(owner, name, method)


def interrupt() -> None:
    raise KeyboardInterrupt
