"""Steps from graphs, with padding and static buffers, on the CPU: graphs that issue anew."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nanovllm import LLM, Config
from nanovllm.engine.auto import calibration, step_timer
from nanovllm.engine.auto.chooser import AutoChooser
from nanovllm.engine.auto.cost_table import CostTable
from nanovllm.engine.auto.planner import Planner
from nanovllm.engine.graph_memory import GraphMemory, batch_sizes
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.plan import MICROBATCH
from nanovllm.engine.stage_times import ClockEvent
from nanovllm.engine.step_inputs import StepLayout
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

    def captured(self: StepRunner, layout: Any) -> Any:
        graph, timer = capture(self, layout)
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
        assert {layout.num_samples for layout in steps.graphs} >= {1, 4, 8}
        assert steps.statistics.steps["pipelined"] == (66 if parts > 1 else 0)
        memory = runner.graph_memory
    assert memory.num_graphs == 0  # what was captured went with the runner


def test_rows_of_replayed_steps_are_scored_as_those_of_issued_ones(monkeypatch):
    def scores(llm: LLM) -> dict[tuple[int, int, int], float]:
        asked = {"temperature": 0, "max_tokens": 6, "logprobs": 2, "use_tqdm": False}
        return {
            (request, place, token): each.logprob
            for request, output in enumerate(llm.generate(list(PROMPTS[:5]), **asked))
            for place, found in enumerate(output["logprobs"])
            for token, each in found.items()
        }

    with engine("microbatch") as llm, monkeypatch.context() as patch:
        steps = llm.model_runner.step_runner
        replayed = scores(llm)
        assert steps.graphs
        patch.setattr(steps, "memory", None)
        patch.setattr(steps.chooser, "memory", None)
        assert replayed == pytest.approx(scores(llm), abs=1e-4)


def test_a_rank_that_is_sent_a_step_captures_what_rank_0_captures(monkeypatch):
    """A capture runs a step, with its collectives: one rank alone in it would wait for good."""
    with engine("microbatch") as llm:
        runner = llm.model_runner
        steps, other = runner.step_runner, runner.make_step_runner(Config(device="cpu"), MICROBATCH)

        def send(layout: StepLayout, flat: Any, *draws: Any) -> None:
            received = StepLayout.from_integers(layout.to_integers())
            other.run(PreparedStep(received, torch.from_numpy(flat.copy())))

        monkeypatch.setattr(runner.ranks, "send_step", send)
        for profiled in (False, True, False):
            llm.config.pipeline_enable_profiling = profiled
            tokens_of(llm, 3)
            assert {layout for layout in steps.graphs if layout.timed} == {
                layout for layout in other.graphs if layout.timed
            }
        assert any(layout.timed for layout in other.graphs)
        other.close()


def test_statistics_are_those_of_the_runner_in_use():
    with engine("sequential") as llm:
        runner = llm.model_runner
        first, second = runner.step_runner, runner.make_step_runner(llm.config, MICROBATCH)
        for steps, mode in ((second, "microbatch"), (first, "sequential")):
            runner.use(steps)
            tokens_of(llm, 3)
            said = runner.get_pipeline_statistics()
            assert (said["mode"], sum(said["steps"].values())) == (mode, 11)
        second.close()


class Event(ClockEvent):
    """The CPU's, called as a timing event of CUDA is."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def synchronize(self) -> None:
        pass


def test_auto_measures_chooses_and_keeps_the_tokens(monkeypatch, tmp_path):
    """Calibration, its timer and the planner at work on real steps, sequential and pipelined."""
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: str(device))
    monkeypatch.setattr(calibration, "SIZE_STEP", 4)
    monkeypatch.setattr(calibration, "LEAST_GAIN", 0.0)  # whatever a pipeline may gain here
    monkeypatch.setattr(calibration, "GIVE_UP_RATIO", 1e9)
    monkeypatch.setattr(step_timer, "READING_SECONDS", 0.0)
    monkeypatch.setattr(step_timer, "MOST_READINGS", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with engine("microbatch") as llm:
        expected = {count: tokens_of(llm, count) for count in (1, 3, 5, 8)}
        runner = llm.model_runner
        steps = runner.step_runner
        assert [scheduler.plan.name for scheduler in steps.schedulers] == [
            "sequential",
            "microbatch",
        ]
        steps.chooser = auto = AutoChooser(steps, runner._calibration(llm.config, steps))
        timed, run, calibrate = [], steps.run, auto.calibration.run

        def recorded(step: PreparedStep, *capture: Any) -> torch.Tensor:
            timed.append(step.layout.timed)
            return run(step, *capture)

        def calibrated(*args: Any, **options: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(steps, "run", recorded)
                return calibrate(*args, **options)

        monkeypatch.setattr(auto.calibration, "run", calibrated)
        llm.config.pipeline_enable_profiling = True
        auto.capture(steps, show_progress=False)
        llm.config.pipeline_enable_profiling = False
        assert set(timed) == {False}  # what profiling costs is no part of a plan's time
        assert all(auto.calibration.table.curves(plan) for plan in (0, 1))
        planned: Any = steps.statistics.as_dict()["planner"]
        assert list(planned["plans"]) == ["sequential", "microbatch"]
        assert list(tmp_path.rglob("plans-*.json"))
        for better, pipelined in ((0, 0), (1, 33)):
            table = CostTable()
            for plan in (0, 1):
                for size in (2, 4, 8):
                    table.add(plan, size, size, 1e-3 if plan == better else 1.0)
            auto.planner = Planner(table, auto.plans, [auto.sizes, [4, 8]])
            before = dict(steps.statistics.steps)
            assert {count: tokens_of(llm, count) for count in expected} == expected
            ran = {path: steps.statistics.steps[path] - before[path] for path in before}
            assert ran == {"pipelined": pipelined, "sequential": 44 - pipelined}
        assert auto.planner.records[1].timed == pipelined
