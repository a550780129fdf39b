"""Mode "auto" on a real GPU: calibration, the choice, and text that does not depend on it."""

import itertools
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM
from nanovllm.bench.shapes import shape_directory
from nanovllm.engine.auto.chooser import AutoChooser
from nanovllm.engine.auto.planner import Planner
from nanovllm.engine.plan import Choice
from tests.gpu.texts import texts

# Batch and context where two calibrations are compared; all batches have graphs of their own.
POINTS = [(256, 512), (256, 1024), (512, 512), (512, 1024)]
PLAN_ROUNDS = 16
PLAN_TOLERANCE = 0.02


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Calibrations are kept here, so that each test measures its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def auto_engine(**options: Any) -> LLM:
    return LLM(device="cuda", enable_pipeline=True, pipeline_strict=True, **options)


def auto_plan(engine: LLM) -> AutoChooser:
    chooser = engine.model_runner.step_runner.chooser
    assert isinstance(chooser, AutoChooser)
    return chooser


def times(decode: AutoChooser) -> list[Any]:
    return [decode.calibration.table.curves(plan) for plan in range(len(decode.plans))]


def test_every_plan_writes_the_same_text(monkeypatch):
    """Also when the plan changes from one step to the next."""
    options = {"max_num_seqs": 128, "max_model_len": 512, "dtype": "float32"}
    with LLM(device="cuda", **options) as engine:
        expected = texts(engine, 100)
    with auto_engine(**options) as engine:
        runner, plans = engine.model_runner.step_runner, auto_plan(engine).plans
        every = [Choice(number, 128) for number in range(len(plans))]
        runner.capture(every, show_progress=False)
        turn = itertools.cycle(every)
        monkeypatch.setattr(runner.chooser, "choose", lambda num_seqs, tokens: next(turn))
        assert texts(engine, 100) == expected
        assert min(engine.model_runner.statistics.steps.values()) > 0
        assert len(plans) > 2


def test_a_calibration_is_kept(cache):
    with shape_directory("8B", 12) as directory:
        options = {"load_format": "dummy", "max_num_seqs": 512, "max_model_len": 2048}
        kept = []
        for _ in range(2):
            with auto_engine(model=directory, **options) as engine:
                kept.append(times(auto_plan(engine)))
            del engine  # it holds the device's memory
            assert len(list(cache.rglob("plans*.json"))) == 1
    # Two measurements would hardly agree to the last bit.
    assert kept[0] == kept[1]


def test_two_calibrations_choose_equally_fast_plans(cache):
    """Where their choices differ, both are measured; run with -s to see them."""
    options = {"load_format": "dummy", "max_num_seqs": 512, "max_model_len": 2048}
    with shape_directory("8B", 12) as directory:

        def calibrate_and_choose() -> list[Choice]:
            with auto_engine(model=directory, **options) as engine:
                return choices(auto_plan(engine))

        first = calibrate_and_choose()
        kept = list(cache.rglob("plans*.json"))
        assert kept
        for path in kept:
            path.unlink()
        apart = {}
        with auto_engine(model=directory, **options) as engine:
            decode = auto_plan(engine)
            names = [plan.name for plan in decode.plans]
            for point, *pair in zip(POINTS, first, choices(decode), strict=True):
                print(f"{point}:", *(names[choice.plan] for choice in pair))
                one, other = (choice.plan for choice in pair)
                if one != other:
                    seconds = measure_in_turn(decode, [one, other], *point)
                    apart[point] = seconds[one] / seconds[other] - 1
                    shown = {names[plan]: f"{1e3 * time:.3f} ms" for plan, time in seconds.items()}
                    print(f"    measured {shown}, {apart[point]:+.1%}")
        del decode, engine  # they hold the device's memory
    assert all(abs(difference) < PLAN_TOLERANCE for difference in apart.values()), apart


def choices(decode: AutoChooser) -> list[Choice]:
    """At each of the points, what a new planner takes by the calibration on disk."""
    made = decode.planner
    fresh = [Planner(made.table, made.plans, made.sizes) for _ in POINTS]
    return [
        planner.choose(batch, batch * context)
        for planner, (batch, context) in zip(fresh, POINTS, strict=True)
    ]


def measure_in_turn(
    decode: AutoChooser, plans: list[int], batch: int, context: int
) -> dict[int, float]:
    """Median seconds of a step by plan, from turns back and forth on random keys and values."""
    times: dict[int, list[float]] = {plan: [] for plan in plans}
    for number in range(PLAN_ROUNDS):
        for plan in plans[:: -1 if number % 2 else 1]:
            times[plan].append(decode.calibration.timer(plan, batch, batch * context))
    return {plan: median(seconds) for plan, seconds in times.items()}


def test_predictions_meet_what_is_measured():
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
