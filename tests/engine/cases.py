"""What the tests of the engine share: options, prompts, and what an idle engine looks like."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.outputs import RequestOutput
from tests.checkpoints import prompts

OPTIONS = {"device": "cpu", "max_model_len": 64, "kvcache_block_size": 16}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPTS = prompts(3, count=4, longest=30)
PIPELINED = {"enable_pipeline": True, "pipeline_mode": "microbatch", "pipeline_strict": True}
# Look-ahead or none, prompts in chunks, few sequences at a time, so few blocks that requests are
# preempted, larger blocks, micro-batches.
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"async_scheduling": False},
    {"max_num_batched_tokens": 5},
    {"max_num_seqs": 3, "enable_prefix_caching": False},
    {"num_kvcache_blocks": 5},
    {"num_kvcache_blocks": 5, "async_scheduling": False, "max_num_batched_tokens": 9},
    {"kvcache_block_size": 32},
    PIPELINED,
]
whatever_the_scheduler_does = pytest.mark.parametrize("options", SCHEDULES, ids=str)


@contextmanager
def scheduled(directory, options: dict[str, Any]) -> Iterator[LLM]:
    """An engine with these options, which preempts if it is to, and ends empty."""
    with LLM(str(directory), **{**OPTIONS, **options}) as engine:
        yield engine
        if "num_kvcache_blocks" in options:
            assert engine.scheduler.num_preemptions > 0
        check_empty(engine)
        assert engine.scheduler.num_asking == 0


def check_empty(engine) -> None:
    assert engine.requests == {}
    assert engine.scheduler.is_idle
    assert len(engine.scheduler.blocks.free) == engine.scheduler.blocks.num_blocks


def tokens(outputs) -> list[list[int]]:
    return [output["token_ids"] for output in outputs]


def said(outputs) -> list[tuple[str, list[int], str]]:
    """What does not vary from one run to the next."""
    return [(output["text"], output["token_ids"], output["finish_reason"]) for output in outputs]


def in_order(outputs) -> list[dict]:
    return sorted(outputs, key=lambda output: (output["index"], output["sample"]))


def steps(engine) -> Iterator[RequestOutput]:
    """What comes out while the engine steps until it is idle."""
    while not engine.is_finished():
        yield from engine.step()


def drain(engine) -> dict[int, list[int]]:
    return {output["request_id"]: output["token_ids"] for output in steps(engine)}


def count_computed(engine, monkeypatch) -> list[int]:
    """A list that gets the number of prompt tokens of each step from now on."""
    counts: list[int] = []

    def watch(moment, step) -> None:
        if moment == "begin":
            parts = [min(chunk.end, chunk.seq.prompt_len) - chunk.start for chunk in step.chunks]
            counts.append(sum(part for part in parts if part > 0))

    monkeypatch.setattr(engine.model_runner, "watch", watch)
    return counts


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


def in_child(task) -> int:
    """Runs `task` in a forked child that ends without any clean-up; returns its exit status."""
    child = os.fork()
    if child == 0:
        try:
            task()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
