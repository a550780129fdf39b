"""What the tests of the benchmark share: its runs, and maps of made-up times."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

import bench_pipeline
from nanovllm.bench import gain_map
from nanovllm.bench.arms import Arm
from nanovllm.bench.gains import judge, summarize

LABELS = ("sequential", "streams", "green 36+96", "auto")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[list[str], dict[str, Any]]:
    """Runs `bench_pipeline.py` on the CPU; returns its lines but the last, and the last, parsed."""
    bench_pipeline.main(["--device", "cpu", *map(str, argv)])
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def run_map(*argv: object) -> None:
    """`bench_pipeline.py --map`."""
    bench_pipeline.main(["--map", *map(str, argv)])


def pretend_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives auto, which falls back to sequential decode on a CPU, a plan that it says to use."""

    def planner(self: Arm) -> dict[str, Any]:
        steps = self.step_runner.statistics.steps["sequential"]
        return {"plan": "green 36+96", "plans": {"green 36+96": {"steps": steps}}}

    monkeypatch.setattr(Arm, "_planner", planner)
    monkeypatch.setattr(Arm, "fallback_reason", lambda self, batch=None: None)


def make_point(batch: int, context: int, **step_ms: float) -> dict[str, Any]:
    """A measured point; names of arms have _ for spaces, and P for +."""
    times = {name.replace("_", " ").replace("P", "+"): ms for name, ms in step_ms.items()}
    arms = {
        label: {"steps": 9, "step_ms": {"median": ms, "q1": ms, "q3": ms}}
        for label, ms in times.items()
    }
    point = {"batch": batch, "context": context, "reason": None, "output": 13, "arms": arms}
    return point | judge(times)


def make_shape(name: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"name": name, "layers": 36, "parameters": 8e9, "dtype": "bfloat16"},
        "startup_seconds": 20.0,
        "kv_blocks": 3000,
        "seconds": 100.0,
        "arms": [
            {
                "label": label,
                "mode": label.split()[0],
                "lane_sms": {"attention": 36, "ffn": 96} if "+" in label else {},
                "fallback_reason": None,
            }
            for label in LABELS
        ],
        "points": points,
    }


def make_map(*shapes: dict[str, Any], device: str = "NVIDIA Something") -> dict[str, Any]:
    return {
        "benchmark": "map",
        "date": "2026-11-23T10:00:00+00:00",
        "device": {"type": "cuda", "name": device, "sms": 132, "memory_gib": 139.8},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "driver": "580.1"},
        "seconds_per_arm": 0.3,
        "sweep_seconds": 100.0,
        "shapes": list(shapes),
        "summary": summarize(list(shapes)),
    }


def random_shape(name: str, batches: list[int], contexts: list[int]) -> dict[str, Any]:
    """Points with random times, except that 1 cannot be cut and the last does not fit."""
    points = []
    for batch in batches:
        for context in contexts:
            times = {"sequential": 2.0, "auto": random.uniform(1.5, 2.0)}
            if batch > 1:
                times["streams"] = random.uniform(1.5, 3)
                times["green_36P96"] = random.uniform(1.5, 3)
            points.append(make_point(batch, context, **times))
    last = points.pop()
    points.append(gain_map.unmeasured_point(last["batch"], last["context"], "it is too large"))
    return make_shape(name, points)
