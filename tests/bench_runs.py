"""What the tests of the benchmark share: its runs, and maps of made-up times."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm.bench import __main__ as bench
from nanovllm.bench.arms import Arm

GROW = ["--workload", "growing", "--batch", "3", "--context", "10", "--until", "60",
        "--stages", "2", "--output", "6"]  # fmt: skip
LABELS = ("sequential", "streams", "green 36+96", "auto")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[list[str], dict[str, Any]]:
    """Runs a benchmark on the CPU; returns its lines but the last, and the last, parsed."""
    bench.main(["--device", "cpu", *map(str, argv)])
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def refusal(
    capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], object], *argv: object
) -> str:
    """The one line on stderr with which a script ends at once."""
    with pytest.raises(SystemExit) as error:
        main([*map(str, argv)])
    out, err = capsys.readouterr()
    assert error.value.code == 2
    assert not out
    assert len(err.splitlines()) == 1
    return err


def without_text(help_text: str) -> list[str]:
    """The options in a --help that are not explained, in their line or the next."""
    options = re.findall(r"^ +(-.*(?:\n {10,}\S.*)?)", help_text, re.MULTILINE)
    assert len(options) > 2
    return [option for option in options if not re.search(r"\S {2,}\S|\n", option)]


def pretend_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives auto, which falls back to sequential decode on a CPU, a plan that it says to use."""
    monkeypatch.setattr(Arm, "plan", "green 36+96")
    monkeypatch.setattr(Arm, "fallback_reason", lambda self, batch=None: None)


def make_point(batch: int, context: int, **step_ms: float) -> dict[str, Any]:
    """A measured point; names of arms have _ for spaces, and P for +."""
    arms = {
        name.replace("_", " ").replace("P", "+"): {"steps": 9, "step_ms": {"median": ms}}
        for name, ms in step_ms.items()
    }
    return {"batch": batch, "context": context, "reason": None, "output": 13, "arms": arms}


def make_shape(name: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"name": name, "layers": 36, "parameters": 8e9, "dtype": "bfloat16"},
        "startup_seconds": 20.0,
        "kv_blocks": 3000,
        "seconds": 100.0,
        "arms": [{"label": label, "fallback_reason": None} for label in LABELS],
        "points": points,
    }


def make_map(*shapes: dict[str, Any], device: str = "NVIDIA Something") -> dict[str, Any]:
    return {
        "benchmark": "map",
        "date": "2026-11-23T10:00:00+00:00",
        "device": {"type": "cuda", "name": device, "sms": 132},
        "versions": {"torch": "2.11.0", "triton": "3.6.0", "driver": "580.1"},
        "seconds_per_arm": 0.3,
        "sweep_seconds": 100.0,
        "shapes": list(shapes),
    }
