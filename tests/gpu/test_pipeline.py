"""The pipeline on a real GPU: where its stages run and when, and that they compute the model."""

import dataclasses
import json
import logging
import operator
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from green_ctx import GreenContextError, GreenDevice
from nanovllm import LLM
from nanovllm.bench.engines import fill_cache
from nanovllm.bench.shapes import published_config
from nanovllm.bench.turns import DecodeWorkload, run_turn
from nanovllm.config import PIPELINE_MODES
from nanovllm.engine import model_runner
from nanovllm.engine.pipeline_modes import PipelineUnavailable
from nanovllm.engine.plan import LANES3, make_order
from nanovllm.engine.step_runner import StepRunner
from nanovllm.models.stage import MicroBatch, Stage
from nanovllm.tiny import PROMPTS
from nanovllm.utils.timeline import trace_events
from tests.decode_cases import relative_error
from tests.gpu.forced_tokens import forced_logits, ragged_prompts
from tests.gpu.recorded_sms import PROGRAMS, SPIN_NS, record_programs, sms_used
from tests.gpu.texts import small_engine, texts
from tests.seed_spec import FAILED, FALLING_BACK, QUICK_START, STATISTICS, lines_of, run_block
from tests.traces import check_trace

NUM_SMS = torch.cuda.get_device_properties(0).multi_processor_count
TINY_LAYERS = 4


@pytest.fixture(scope="module", autouse=True)
def _green_contexts() -> None:
    try:
        GreenDevice(0)
    except GreenContextError as error:
        pytest.skip(f"no green contexts here: {error}")


def split(attention: int, ffn: int) -> dict[str, int]:
    return {"pipeline_attention_sm_count": attention, "pipeline_ffn_sm_count": ffn}


FFN_SMS = NUM_SMS * 3 // 4 // 8 * 8
FIXED_MODES = [mode for mode in PIPELINE_MODES if mode != "auto"]
SPLITS = {"the seed's": split(16, 16), "the whole device": split(NUM_SMS - FFN_SMS, FFN_SMS)}


def pipelined_engine(model: Any = None, mode: str = "green", **options: Any) -> LLM:
    defaults = {"num_kvcache_blocks": 128, "pipeline_strict": True}
    pipeline = {"enable_pipeline": True, "pipeline_mode": mode}
    return small_engine(model, **defaults | pipeline | options)


def statistics(engine: LLM) -> dict[str, Any]:
    return engine.model_runner.get_pipeline_statistics()


# Where and when the stages run


class Reporter:
    """Has every stage of the pipelined steps of an engine also report the SMs that it runs on.

    From the next step on; graphs that were captured before are gone.
    """

    def __init__(self, steps: StepRunner) -> None:
        self.scheduler = steps.schedulers[-1]
        self.plan = self.scheduler.plan
        stages = [
            dataclasses.replace(stage, run=partial(self._run, number, stage))
            for number, stage in enumerate(self.scheduler.model.stages())
        ]
        count = len(stages) * self.plan.micro_batches
        self.records = torch.empty((count, PROGRAMS, 3), dtype=torch.int64, device="cuda")
        self.lanes = [
            self.plan.lane_of(stage.name).name
            for stage in stages
            for _ in range(self.plan.micro_batches)
        ]
        self.scheduler.orders = {
            n: make_order(stages, self.plan, n) for n in (1, self.plan.micro_batches)
        }
        for graph, _ in steps.graphs.values():
            graph.reset()
        if steps.memory is not None:
            steps.memory.release(len(steps.graphs))
        steps.graphs.clear()
        self.forget()

    def forget(self) -> None:
        self.records.fill_(-1)
        torch.cuda.synchronize()

    def _run(self, number: int, stage: Stage, batch: MicroBatch) -> None:
        stage.run(batch)
        row = self.plan.micro_batches * number + batch.index
        record_programs[(PROGRAMS,)](self.records[row], SPIN_NS, num_warps=1)

    def check_partitions(self, lane_sms: dict[str, int]) -> None:
        """Every stage of every micro-batch ran, on its own partition's SMs and all of them.

        The grid is many times what a partition holds at a time, and each program takes its time,
        so the programs of all launches together are seen on every SM that they may run on.
        """
        used: dict[str, set[int]] = {lane: set() for lane in lane_sms}
        for lane, launch in zip(self.lanes, self.records, strict=True):
            used[lane] |= sms_used(launch)
        assert {lane: len(sms) for lane, sms in used.items()} == lane_sms
        assert len(set().union(*used.values())) == sum(lane_sms.values())


@pytest.mark.parametrize("eager", [False, True], ids=["replayed graph", "eager"])
@pytest.mark.parametrize("counts", SPLITS)
def test_stages_run_on_disjoint_sms_of_the_granted_counts(counts, eager, cpu_texts):
    with pipelined_engine(enforce_eager=eager, **SPLITS[counts]) as engine:
        steps = engine.model_runner.step_runner
        reporter = Reporter(steps)
        granted = statistics(engine)["lane_sms"]
        assert all(map(operator.ge, granted.values(), SPLITS[counts].values()))
        assert sum(granted.values()) <= NUM_SMS
        assert texts(engine, 4) == cpu_texts[:4]
        reporter.check_partitions(granted)
        # Once more: now all graphs have been captured, so that these are replays.
        captured = set(steps.graphs)
        assert bool(captured) == (not eager)
        reporter.forget()
        assert texts(engine, 4) == cpu_texts[:4]
        reporter.check_partitions(granted)
        assert set(steps.graphs) == captured


def test_three_lanes_run_on_three_partitions(cpu_texts):
    """The benchmark's plan with QKV on a lane of its own, and three micro-batches."""
    with pipelined_engine(mode="sequential") as engine:
        runner = engine.model_runner
        own = runner.step_runner
        plan = LANES3.with_sms((NUM_SMS - FFN_SMS, FFN_SMS - 16, 16))
        runner.step_runner = runner.make_step_runner(engine.config, plan)
        try:
            reporter = Reporter(runner.step_runner)
            for _ in range(2):
                reporter.forget()
                assert texts(engine, 6) == cpu_texts[:6]
                reporter.check_partitions(runner.step_runner.statistics.lane_sms)
            assert runner.step_runner.statistics.steps["pipelined"] > 0
        finally:
            torch.cuda.synchronize()
            runner.step_runner.close()
            runner.step_runner = own


def write_config(directory: Path, shape: str, layers: int) -> Path:
    """A model of real layers with random weights and a small vocabulary."""
    config = published_config(shape, layers) | {"vocab_size": 4096, "eos_token_id": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_stages_of_a_replayed_graph_run_at_the_same_time(tmp_path, monkeypatch):
    layers, workload = 4, DecodeWorkload(batch=512, context=512, output=16)
    # One graph is enough, and the largest matters.
    monkeypatch.setattr(model_runner, "batch_sizes", lambda largest: [largest])
    with pipelined_engine(
        write_config(tmp_path, "8B", layers),
        load_format="dummy",
        max_num_seqs=workload.batch,
        num_kvcache_blocks=workload.blocks(256),
        enable_prefix_caching=False,
        pipeline_enable_profiling=True,
        **SPLITS["the whole device"],
    ) as engine:
        fill_cache(engine)
        run_turn(engine, workload)
        stats = statistics(engine)
        steps = list(engine.model_runner.statistics.recent)
    assert stats["steps"] == {"pipelined": 16, "sequential": 0}
    assert stats["profiled_steps"] == 16
    assert check_trace(trace_events(steps), layers, 2) == 16
    assert stats["overlap_share"] > 0.3
    # Together the stages ran for longer than the step took.
    assert stats["avg_attention_ms"] + stats["avg_ffn_ms"] > 1.2 * stats["avg_total_ms"]


# What the stages compute


@pytest.mark.parametrize(("shape", "layers"), [("0.6B", 4), ("8B", 2)])
def test_pipelined_bfloat16_logits_are_near_the_sequential_ones(
    tmp_path, monkeypatch, shape, layers
):
    """Full batches and padded ones, whose padding rows are in both micro-batches."""
    steps = 4
    given = {count: ragged_prompts(count, 300, 4096, count) for count in (2, 3, 5, 17, 31, 32)}
    with LLM(
        str(write_config(tmp_path, shape, layers)),
        device="cuda",
        load_format="dummy",
        max_num_seqs=32,
        max_model_len=512,
        num_kvcache_blocks=128,
        enable_prefix_caching=False,
    ) as engine:
        runner = engine.model_runner
        own = runner.step_runner
        expected = {n: forced_logits(monkeypatch, engine, p, steps) for n, p in given.items()}
        for mode in ("microbatch", "streams", "green"):
            runner.step_runner = runner.make_step_runner(
                dataclasses.replace(
                    engine.config,
                    enable_pipeline=True,
                    pipeline_mode=mode,
                    pipeline_strict=True,
                    **SPLITS["the whole device"],
                )
            )
            try:
                for count, prompts in given.items():
                    logits = forced_logits(monkeypatch, engine, prompts, steps)
                    for step in range(1, steps):
                        error = relative_error(logits[step], expected[count][step])
                        assert error < 2e-2, (mode, count, step)
                tokens = runner.step_runner.statistics.tokens
                assert tokens == {"pipelined": sum(given) * (steps - 1), "sequential": 0}
            finally:
                torch.cuda.synchronize()
                runner.step_runner.close()
                runner.step_runner = own


@pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("mode", FIXED_MODES)
def test_all_modes_write_the_text_of_the_cpu(mode, eager, cpu_texts):
    with pipelined_engine(mode=mode, enforce_eager=eager) as engine:
        assert texts(engine) == cpu_texts[:8]
        stats = statistics(engine)
    assert stats["mode"] == mode
    assert stats["fallback_reason"] is None
    assert (stats["steps"]["pipelined"] > 0) == (mode != "sequential")


def test_auto_has_no_choice_without_graphs():
    with pytest.raises(PipelineUnavailable, match="enforce_eager=True"):
        pipelined_engine(mode="auto", enforce_eager=True)


@pytest.fixture(scope="module")
def green() -> Iterator[LLM]:
    """A float32 engine, whose tokens do not depend on the rest of the batch."""
    with pipelined_engine(dtype="float32", max_num_seqs=32) as engine:
        yield engine


@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 31, 32])
def test_green_batches_of_any_size_write_the_text_of_the_cpu(green, count, cpu_texts):
    before = statistics(green)["steps"]["pipelined"]
    assert texts(green, count) == (2 * cpu_texts)[:count]
    if count > 1:
        assert statistics(green)["steps"]["pipelined"] > before


@torch.inference_mode()
def test_decode_token_runs_eagerly_beside_the_graphs(green, cpu_texts):
    scheduler, model = green.model_runner.pipeline_scheduler, green.model_runner.model
    lengths = [3, 40, 1, 7]
    tokens = torch.randint(2, 1024, (sum(lengths),), device="cuda")
    positions = torch.cat([torch.arange(length, device="cuda") for length in lengths])
    expected = model.compute_logits(model(tokens, positions))
    before = scheduler.get_statistics()
    for _ in range(3):
        logits = scheduler.decode_token(tokens, positions)
        assert relative_error(logits, expected) < 1e-4
    with pytest.raises(ValueError, match=r"^positions has shape"):
        scheduler.decode_token(input_ids=tokens, positions=positions[1:])
    stats = scheduler.get_statistics()
    assert stats["tokens"]["pipelined"] - before["tokens"]["pipelined"] == 3 * len(tokens)
    assert stats["profiled_steps"] - before["profiled_steps"] == 3
    assert texts(green, 3) == cpu_texts[:3]


def test_profiling_can_be_switched_at_any_time():
    with pipelined_engine() as engine:

        def profiled_steps() -> int:
            options = {"temperature": 0, "max_tokens": 5, "ignore_eos": True, "use_tqdm": False}
            engine.generate(list(PROMPTS[:3]), **options)
            return statistics(engine)["profiled_steps"]

        assert profiled_steps() == 0
        engine.config.pipeline_enable_profiling = True
        assert profiled_steps() == 4
        engine.config.pipeline_enable_profiling = False
        assert profiled_steps() == 4
        stats, recent = statistics(engine), list(engine.model_runner.statistics.recent)
    assert min(stats["avg_attention_ms"], stats["avg_ffn_ms"]) > 0
    assert stats["avg_total_ms"] >= max(stats["avg_attention_ms"], stats["avg_ffn_ms"])
    assert check_trace(trace_events(recent), TINY_LAYERS, 2) == 4


# The specification, and what happens where it cannot be kept


def test_quick_start_runs_as_a_pipeline(caplog, capsys):
    caplog.set_level(logging.INFO)
    random.seed(0)  # requests without a seed draw theirs here
    names = run_block(QUICK_START)
    engine = names["engine"]
    stats = statistics(engine)
    engine.exit()
    assert f"[ModelRunner] Pipeline: attention 16, FFN 16 of {NUM_SMS} SMs" in caplog.messages
    assert FALLING_BACK not in caplog.messages
    printed = capsys.readouterr().out
    assert lines_of(STATISTICS).match(printed)
    assert "  Mode: auto\n" in printed
    assert "  Plan: sequential (switched 0 times)\n" in printed  # of a batch of one
    assert stats["fallback_reason"] is None
    (output,) = names["outputs"]
    assert stats["total_tokens"] == len(output["token_ids"]) - 1


def test_an_engine_that_falls_back_decodes_from_graphs_as_ever(caplog, cpu_texts):
    counts = split(10_000, 16)
    with pipelined_engine(pipeline_strict=False, **counts) as engine:
        assert texts(engine) == cpu_texts[:8]
        stats = statistics(engine)
        layouts = list(engine.model_runner.step_runner.graphs)
    reason = stats["fallback_reason"]
    assert reason.startswith("pipeline_attention_sm_count=10000 and pipeline_ffn_sm_count=16 are")
    assert reason.endswith(f"and the device has {NUM_SMS}")
    ours = [message for message in caplog.messages if message.startswith("[")]
    assert ours == [FAILED + reason, FALLING_BACK]
    assert stats["steps"]["pipelined"] == 0 < stats["steps"]["sequential"]
    assert [layout.num_samples for layout in layouts] == [8, 4, 2, 1]
    assert {layout.plan for layout in layouts} == {0}
