"""Mode "auto" on a real GPU: calibration, the choice, and text that does not depend on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

from nanovllm import LLM
from nanovllm.bench.shapes import shape_directory
from nanovllm.engine.planned_decode import PlannedDecode
from tests.gpu.test_pipeline import texts

CALIBRATION_SECONDS = 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrations are kept here, so that each test measures its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def auto_engine(**options: Any) -> LLM:
    return LLM(device="cuda", enable_pipeline=True, pipeline_strict=True, **options)


def planned(engine: LLM) -> PlannedDecode:
    decode = engine.model_runner.decode
    assert isinstance(decode, PlannedDecode)
    return decode


def test_every_plan_writes_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the plan changes from one step to the next."""
    options = {"max_num_seqs": 128, "max_model_len": 512, "dtype": "float32"}
    with LLM(device="cuda", **options) as engine:
        expected = texts(engine, 100)
    with auto_engine(**options) as engine:
        decode = planned(engine)
        sizes = decode.calibration.run(decode.ways, show_progress=False)
        for plan, way in decode.ways.items():
            decode.planner.add_size(plan, 128)
            way.capture(show_progress=False, sizes=[128])
            decode.calibration.table.add(plan.name, 128, [(128, 1.0)])
        turn = iter(range(10**9))
        choose = decode.planner.choose

        def next_plan(num_seqs: int, tokens: int) -> Any:
            plan = decode.planner.plans[next(turn) % len(decode.planner.plans)]
            return choose(num_seqs, tokens)._replace(plan=plan, batch=128)

        monkeypatch.setattr(decode.planner, "choose", next_plan)
        assert texts(engine, 100) == expected
        assert min(engine.model_runner.statistics.steps.values()) > 0
        assert len(sizes) == len(decode.ways) - 1


def test_calibration_is_short_and_kept(cache: Path) -> None:
    with shape_directory("8B", 12) as directory:
        options = {"load_format": "dummy", "max_num_seqs": 512, "max_model_len": 2048}

        def start() -> tuple[float, Any]:
            with auto_engine(model=directory, **options) as engine:
                decode = planned(engine)
                begin = time.perf_counter()
                decode.calibrate(show_progress=False)
                return time.perf_counter() - begin, decode.calibration.table.to_json()

        start()  # compiles kernels
        for path in cache.rglob("plans*.json"):
            path.unlink()
        with auto_engine(model=directory, **options) as engine:
            decode = planned(engine)
            for path in cache.rglob("plans*.json"):
                path.unlink()
            begin = time.perf_counter()
            decode.calibrate(show_progress=False)
            assert time.perf_counter() - begin < CALIBRATION_SECONDS
            measured = decode.calibration.table.to_json()
        del decode, engine  # they hold the device's memory
        seconds, kept = start()
        assert seconds < 2
        assert kept == measured


def test_predictions_meet_what_is_measured() -> None:
    with (
        shape_directory("8B", 12) as directory,
        auto_engine(
            model=directory, load_format="dummy", max_num_seqs=512, enable_prefix_caching=False
        ) as engine,
    ):
        prompts = np.random.default_rng(0).integers(0, 1000, (512, 400)).tolist()
        engine.generate(prompts, max_tokens=40, ignore_eos=True, use_tqdm=False)
        record: Any = engine.model_runner.get_pipeline_statistics()["planner"]
    used = record["plans"][record["plan"]]
    assert used["measured_ms"] == pytest.approx(used["predicted_ms"], rel=0.1)
