"""The specification's code blocks, options and printed lines, as they are written there.

Here they run without a GPU, and so fall back. tests/gpu/test_pipeline.py runs the same on one.
"""

import dataclasses
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import example_pipeline
from nanovllm import Config, LLMEngine
from nanovllm.engine.green_manager import GreenContextManager
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.pipeline_statistics import PipelineStatistics
from nanovllm.engine.stage_times import Span
from nanovllm.tiny import PROMPTS
from tests.checkpoints import Shape
from tests.decode_cases import DecodeCase, relative_error
from tests.fake_driver import FakeDriver, Result, install
from tests.seed_spec import (
    FELL_BACK,
    GREEN_FAILED,
    GREEN_MANAGER,
    OPTIONS,
    PROFILING,
    QUICK_START,
    SCHEDULER,
    SPLIT_MODEL,
    STATISTICS,
    lines_of,
    run_block,
)
from tests.traces import check_trace

ROOT = Path(example_pipeline.__file__).resolve().parent
TINY_LAYERS = 4


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU, wherever this runs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_quick_start_runs_and_falls_back(no_gpu, caplog, capsys):
    random.seed(0)  # requests without a seed draw theirs here
    names = run_block(QUICK_START)
    engine = names["engine"]
    stats = engine.model_runner.get_pipeline_statistics()
    engine.exit()
    assert lines_of(FELL_BACK).fullmatch("\n".join(caplog.messages) + "\n")
    assert stats["fallback_reason"] == "pipeline_mode='auto' needs a CUDA GPU, not cpu"
    assert caplog.messages[0].endswith(stats["fallback_reason"])
    printed = capsys.readouterr().out
    assert lines_of(STATISTICS).match(printed)
    assert f"Total tokens processed: {stats['total_tokens']}\n" in printed
    (output,) = names["outputs"]
    assert 2 <= len(output["token_ids"]) <= 50
    # The prompt's step draws the first token, decode steps all others.
    assert stats["total_tokens"] == len(output["token_ids"]) - 1


def test_the_options_have_the_types_and_defaults_of_the_table():
    fields = {field.name: field for field in dataclasses.fields(Config)}
    rows = [[cell.strip(" `") for cell in row.split("|")[1:4]] for row in OPTIONS.split("\n")[1:-1]]
    assert len(rows) == 4
    for name, kind, default in rows:
        assert fields[name].type == kind
        assert str(fields[name].default) == str(getattr(Config(), name)) == default


def test_green_context_manager_block_runs(monkeypatch):
    """With a fake driver, and torch streams that are only their handles."""
    bindings = FakeDriver()
    install(monkeypatch, bindings)
    names = run_block(GREEN_MANAGER, GreenContextManager=GreenContextManager, torch=torch)
    attention, ffn = (bindings.sms_of(names[name]) for name in ("attn_stream", "ffn_stream"))
    assert (len(attention), len(ffn)) == (16, 16)
    assert not attention & ffn
    names["green_manager"].close()
    assert bindings.contexts == {}


def test_a_failed_green_context_is_logged_with_the_drivers_code(monkeypatch, caplog):
    bindings = FakeDriver(errors={"cuGreenCtxCreate": [Result.CUDA_ERROR_INVALID_RESOURCE_TYPE]})
    install(monkeypatch, bindings)
    with pytest.raises(RuntimeError):
        run_block(GREEN_MANAGER, GreenContextManager=GreenContextManager, torch=torch)
    assert caplog.messages[0].startswith(GREEN_FAILED.strip())


def test_pipeline_scheduler_block_runs():
    case = DecodeCase(Shape(), 3)
    tokens, positions = case.whole()
    names = run_block(
        SCHEDULER,
        pipeline_scheduler=PipelineScheduler(case.model),
        input_ids=tokens,
        positions=positions,
    )
    last = [i - 1 for i, position in enumerate([*positions, 0]) if position == 0][1:]
    assert relative_error(names["logits"][last], case.expected_logits()) < 1e-5
    assert names["stats"]["total_tokens"] == len(tokens)


@torch.inference_mode()
def test_split_model_block_runs_a_layer():
    """Of a model of one layer, it is the whole model."""
    case = DecodeCase(Shape(layers=1), 1)
    tokens, positions = torch.tensor([5, 6, 7, 8]), torch.arange(4)
    names = run_block(SPLIT_MODEL, model=case.model, input_ids=tokens, positions=positions)
    assert torch.equal(names["hidden_states"], case.model(tokens, positions))
    assert torch.equal(names["residual"], case.model.model.embed_tokens(tokens))
    logits = case.model.compute_logits(names["hidden_states"])
    assert relative_error(logits, case.oracle(tokens[None]).logits[0]) < 1e-5


@pytest.mark.parametrize("built", [False, True], ids=["before the engine", "after the engine"])
def test_profiling_switched_on_in_a_finished_config_takes_effect(built, capsys):
    config = Config(device="cpu", enable_pipeline=True)
    if not built:
        config.pipeline_enable_profiling = True
    with LLMEngine(config) as engine:
        config.pipeline_enable_profiling = True
        engine.generate(list(PROMPTS[:2]), max_tokens=4, ignore_eos=True, use_tqdm=False)
        run_block(PROFILING, config=config, engine=engine)
    assert lines_of(STATISTICS).match(capsys.readouterr().out)


def test_the_statistics_are_printed_as_specified():
    statistics = PipelineStatistics()
    statistics.count_step(128, pipelined=True)
    spans = [
        Span("attention", 0, (("attention", 0),), 0.0, 2.34),
        Span("ffn", 0, (("mlp", 0),), 2.34, 5.46),
    ]
    statistics.add_times(spans, 5.46)
    assert statistics.format().startswith(STATISTICS.strip() + "\n")


# The example


def run_example(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    path = str(ROOT / "example_pipeline.py")
    monkeypatch.setattr(sys, "argv", [path, "--device", "cpu", "--max-tokens", "5", *arguments])
    runpy.run_path(path, run_name="__main__")


def test_the_example_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "example_pipeline.py"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert all(repr(prompt) in done.stdout for prompt in PROMPTS[:8])
    assert lines_of(STATISTICS).search(done.stdout)
    assert lines_of(FELL_BACK).search(done.stderr)


def test_the_example_writes_a_trace(tmp_path, monkeypatch, capsys):
    path = tmp_path / "steps.json"
    run_example(monkeypatch, "--mode", "microbatch", "--timeline", str(path))
    assert f"Timeline written to {path}" in capsys.readouterr().out
    # The prompts' step draws the first of 5 tokens, so there are 4 decode steps.
    assert check_trace(json.loads(path.read_text())["traceEvents"], TINY_LAYERS, 2) == 4


def test_the_example_draws_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = tmp_path / "steps.png"
    run_example(monkeypatch, "--timeline", str(path))
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
