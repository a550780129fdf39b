"""`bench_pipeline.py --map`, measured on the CPU with the embedded model.

Run with `pytest tests/test_bench_map.py`; it takes some seconds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.image import imread

import bench_pipeline
from nanovllm.bench import BenchError, DoesNotFit, sweep
from nanovllm.bench.arms import Arm, ArmSpec
from nanovllm.bench.compare import FEWEST_ROUNDS
from nanovllm.bench.heat_map import draw_map
from nanovllm.bench.map_report import format_map
from nanovllm.bench.sweep import FEWEST_STEPS
from nanovllm.engine.pipeline_statistics import PipelineStatistics
from tests.bench_maps import make_map, make_point, make_shape, run_map

BATCHES = {"0.6B": [1, 8, 32], "14B": [1, 8]}
CONTEXTS = {"0.6B": [128, 512], "14B": [128, 512, 1024]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the record and the picture of a map of the defaults."""
    directory = tmp_path_factory.mktemp("map")
    json_file, picture = directory / "map.json", directory / "map.png"
    run_map("--device", "cpu", "--seconds", "0.02", "--json", json_file, "--plot", picture)
    return directory


@pytest.fixture
def record(files: Path) -> dict[str, Any]:
    return json.loads((files / "map.json").read_text(encoding="utf-8"))


class TestOnTheCpu:
    def test_every_point_is_measured(self, record: dict[str, Any]) -> None:
        (shape,) = record["shapes"]
        assert shape["name"] == "tiny"
        assert 0 < shape["startup_seconds"] < shape["seconds"] < record["sweep_seconds"]
        points = {(point["batch"], point["context"]): point for point in shape["points"]}
        assert points.keys() == {(1, 32), (1, 64), (4, 32), (4, 64)}
        for (batch, _), point in points.items():
            assert point["reason"] is None
            timed = {"sequential"} if batch == 1 else {"sequential", "microbatch"}
            assert point["arms"].keys() == timed
            for arm in point["arms"].values():
                times = arm["step_ms"]
                assert 0 < times["q1"] <= times["median"] <= times["q3"]
                assert arm["steps"] >= FEWEST_ROUNDS * FEWEST_STEPS

    def test_gains_follow_from_the_times(self, record: dict[str, Any]) -> None:
        for point in record["shapes"][0]["points"]:
            times = {label: arm["step_ms"]["median"] for label, arm in point["arms"].items()}
            gains = {label: times["sequential"] / times[label] for label in point["gains"]}
            assert point["gains"] == pytest.approx(gains)
            assert point["best_gain"] == point["gains"].get("microbatch")
            assert point["auto_holds"] is None

    def test_arms_that_fall_back_say_why(
        self, files: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run_map("--from", files / "map.json")
        *table, last = capsys.readouterr().out.splitlines()
        assert any("auto is not timed, falls back: pipeline_mode='auto' needs" in r for r in table)
        rows = [row.split() for row in table]
        assert ["batch", "context", "seq.", "ms", "microbatch", "auto", "best"] in rows
        assert [row[3:] for row in rows if row[:2] == ["1", "64"]] == [["-", "-", "-"]]
        assert [row[4:] for row in rows if row[:2] == ["4", "64"]] == [["-", "microbatch"]]
        assert json.loads(last)["benchmark"] == "map"

    def test_the_picture_is_redrawn_from_the_record(self, files: Path, tmp_path: Path) -> None:
        again = tmp_path / "again.png"
        run_map("--from", files / "map.json", "--plot", again)
        assert (imread(again) == imread(files / "map.png")).all()

    def test_points_that_do_not_fit_are_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["--device", "cpu", "--seconds", "0.01", "--modes", "sequential"]
        run_map(*argv, "--batches", "2", "2", "--contexts", "5000", "20")
        *table, last = capsys.readouterr().out.splitlines()
        fits, too_long = json.loads(last)["shapes"][0]["points"]
        assert (fits["context"], too_long["context"]) == (20, 5000)
        assert fits["reason"] is None
        assert "must be below the model's longest sequence" in too_long["reason"]
        assert "    2     5000  does not fit" in table
        (summary,) = (line for line in table if line.startswith("1 points in "))
        assert summary.endswith("; 1 more do not fit")

    def test_a_shape_that_does_not_fit_does_not_stop_the_map(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def refuse(*args: object, **options: object) -> None:
            raise DoesNotFit("no memory left")

        monkeypatch.setattr(sweep, "start_engine", refuse)
        run_map("--device", "cpu")
        assert "Qwen3 tiny: not measured, no memory left" in capsys.readouterr().out


class TestPlans:
    """Which plan auto chose, where it has a planner."""

    def test_a_point_has_the_plan_in_use_at_its_end(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        as_dict = PipelineStatistics.as_dict

        def planned(self: PipelineStatistics) -> dict[str, object]:
            only_fours = self.tokens["sequential"] == 4 * self.steps["sequential"]
            plan = "sequential" if only_fours else "green 36+96"
            plans = {"sequential": {"steps": self.steps["sequential"]}, "green 36+96": {"steps": 0}}
            return as_dict(self) | {"planner": {"plan": plan, "switches": 1, "plans": plans}}

        monkeypatch.setattr(PipelineStatistics, "as_dict", planned)
        monkeypatch.setattr(Arm, "fallback_reason", lambda self, batch: None)
        argv = ["--device", "cpu", "--seconds", "0.01", "--modes", "auto", "--contexts", "16"]
        run_map(*argv, "--batches", "2", "4")
        *table, last = capsys.readouterr().out.splitlines()
        points = json.loads(last)["shapes"][0]["points"]
        assert [(point["batch"], point["plan"]) for point in points] == [
            (4, "sequential"),
            (2, "green 36+96"),
        ]
        for point in points:
            # Without the steps of its first turn, which tells how many rounds there are.
            assert point["plan_steps"] == {"sequential": point["output"] * FEWEST_ROUNDS}
        (head,) = (line for line in table if line.startswith("batch"))
        assert head.endswith("  auto's plan  best")
        rows = [line.split() for line in table if line.split()[1:2] == ["16"]]
        assert [row[4] for row in rows] == ["36+96", "sequential"]

    def test_without_a_planner_there_is_neither_plan_nor_column(
        self, record: dict[str, Any]
    ) -> None:
        for point in record["shapes"][0]["points"]:
            assert point["plan"] is None
            assert point["plan_steps"] == {}
        assert "auto's plan" not in format_map(record)

    def test_maps_of_before_have_no_plans(self) -> None:
        old = make_point(8, 128, sequential=1.0, auto=1.0)
        assert "auto's plan" not in format_map(make_map(make_shape("8B", [old])))
        new = make_point(8, 512, sequential=1.0, auto=1.0) | {"plan": "streams"}
        rows = format_map(make_map(make_shape("8B", [old, new]))).splitlines()
        assert [row.split()[-2] for row in rows if row.startswith("    8")] == ["-", "streams"]

    @pytest.mark.parametrize("extra", [{}, {"planner": None}])
    def test_an_arm_without_a_planner_has_no_plan(self, extra: dict[str, Any]) -> None:
        statistics = SimpleNamespace(as_dict=lambda: {"mode": "green"} | extra)
        steps: Any = SimpleNamespace(statistics=statistics)
        runner: Any = None
        arm = Arm(ArmSpec("auto"), runner, steps)
        assert arm.plan is None
        assert arm.plan_steps == {}


class TestBadArguments:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--batch", "2"], "--batch is an option of --workload decode and --workload grow"),
            (["--model", "m"], "--model is an option of --workload decode and --workload growing"),
            (["--splits", "36-96"], "36-96 is not of the form A+F, such as 36+96"),
            (["--splits", "0+96"], "0+96 is not of the form A+F"),
            (["--splits", "36+96"], "--splits needs green among --modes"),
            (["--shapes", "7B"], "--shapes: invalid choice: '7B'"),
            (["--contexts", "-1"], "--contexts: -1 is not above 0"),
            (["--layers", "2"], "--layers does not go with tiny"),
            (["--shapes", "tiny", "8B", "--layers", "2"], "--layers does not go with tiny"),
            (["--plot", "map.pdf"], "--plot map.pdf is not allowed: the name must end in .png"),
            (["--plot", "nowhere/map.png"], "there is no directory nowhere"),
            (["--from", "map.json", "--seconds", "1"], "--seconds has no meaning with --from"),
            (["--from", "nowhere.json"], "--from nowhere.json cannot be read"),
        ],
    )
    def test_is_an_error_that_says_why(
        self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_info:
            run_map("--device", "cpu", *argv)
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err

    def test_points_and_pictures_belong_to_maps(self, capsys: pytest.CaptureFixture[str]) -> None:
        for argv in (["--shapes", "8B"], ["--plot", "x.png"]):
            with pytest.raises(SystemExit):
                bench_pipeline.main(argv)
            assert f"{argv[0]} is an option of --map" in capsys.readouterr().err

    def test_a_picture_without_matplotlib(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(BenchError, match="needs matplotlib: pip install matplotlib"):
            draw_map(make_map(), Path("map.png"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit):
            run_map("--device", "cpu", "--plot", "map.png")
        assert "--plot needs matplotlib" in capsys.readouterr().err
