"""Steps from graphs, with padding and static buffers, on the CPU: graphs that issue anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine.cuda_graphs import GraphMemory, batch_sizes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.plan import MICROBATCH
from nanovllm.engine.step_runner import PreparedStep, StepRunner
from nanovllm.tiny import PROMPTS

LARGEST = 8


class Memory(GraphMemory):
    """Static buffers on the CPU."""

    def __init__(self, runner: ModelRunner) -> None:
        self.sizes, self.num_graphs = batch_sizes(LARGEST), 0
        size = runner.inputs.decode_layout(0, LARGEST, LARGEST).size
        self.inputs = torch.zeros(size, dtype=torch.int32)
        self.logits = torch.zeros(LARGEST, runner.model_config.vocab_size)

    def release(self, num_graphs: int) -> None:
        self.num_graphs -= num_graphs

    @contextmanager
    def capturing(self, graph: Any) -> Iterator[None]:
        self.num_graphs += 1
        yield


class Graph:
    """What was captured: a step on the static buffers."""

    def reset(self) -> None:
        del self.replay

    replay: Any


@pytest.fixture(autouse=True)
def _graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = StepRunner._capture

    def captured(self: StepRunner, layout: Any, profiled: bool) -> Any:
        graph, timer = capture(self, layout, profiled)
        step = PreparedStep(layout, self.memory.inputs[: layout.size])
        graph.replay = lambda: self.run(step, self.memory.logits[: layout.num_samples], timer)
        return graph, timer

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(StepRunner, "_capture", captured)
    monkeypatch.setattr(ModelRunner, "_make_graph_memory", lambda self, dtype: Memory(self))


def tokens_of(llm: LLM, count: int) -> list[list[int]]:
    options = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "use_tqdm": False}
    return [output["token_ids"] for output in llm.generate(list(PROMPTS[:count]), **options)]


def engine(mode: str) -> LLM:
    return LLM(device="cpu", max_num_seqs=LARGEST, enable_pipeline=True, pipeline_mode=mode)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_replayed_steps_of_any_batch_have_the_tokens_of_issued_ones(parts, monkeypatch):
    with monkeypatch.context() as patch, engine("sequential") as llm:
        patch.setattr(llm.model_runner.step_runner, "memory", None)
        patch.setattr(llm.model_runner.step_runner.chooser, "memory", None)
        expected = {count: tokens_of(llm, count) for count in (1, 3, 5, 8)}
        assert llm.model_runner.statistics.steps["sequential"] == 44
    with engine("sequential" if parts == 1 else "microbatch") as llm:
        runner = llm.model_runner
        if parts == 3:
            runner.step_runner.close()
            plan = dataclasses.replace(MICROBATCH, micro_batches=3)
            runner.step_runner = runner.make_step_runner(llm.config, plan)
        for profiled in (False, True):
            llm.config.pipeline_enable_profiling = profiled
            assert {count: tokens_of(llm, count) for count in expected} == expected
        steps = runner.step_runner
        assert steps.statistics.profiled_steps == 44
        assert {layout.num_samples for layout, _ in steps.graphs} >= {1, 4, 8}
        assert steps.statistics.steps["pipelined"] == (66 if parts > 1 else 0)
        memory = runner.graph_memory
    assert memory.num_graphs == 0  # what was captured went with the runner
