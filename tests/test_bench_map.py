"""`bench_pipeline.py --map`: measured on the CPU with the embedded model, and on made-up times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from nanovllm.bench import BenchError, DoesNotFit, gain_map, report
from nanovllm.bench.gains import describe, judge, summarize
from nanovllm.bench.pictures import draw_map
from nanovllm.bench.turns import FEWEST_ROUNDS
from tests.bench_runs import (
    make_map,
    make_point,
    make_shape,
    pretend_planner,
    random_shape,
    run,
    run_map,
)

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the record and the picture of a map of the defaults."""
    directory = tmp_path_factory.mktemp("map")
    json_file, picture = directory / "map.json", directory / "map.png"
    run_map("--device", "cpu", "--seconds", "0.02", "--json", json_file, "--plot", picture)
    return directory


class TestOnTheCpu:
    def test_every_point_is_measured(self, files: Path) -> None:
        record = json.loads((files / "map.json").read_text(encoding="utf-8"))
        (shape,) = record["shapes"]
        assert shape["name"] == "tiny"
        assert 0 < shape["startup_seconds"] < shape["seconds"] <= record["sweep_seconds"]
        points = {(point["batch"], point["context"]): point for point in shape["points"]}
        assert points.keys() == {(1, 32), (1, 64), (4, 32), (4, 64)}
        for (batch, _), point in points.items():
            timed = {"sequential"} if batch == 1 else {"sequential", "microbatch"}
            assert point["arms"].keys() == timed
            for arm in point["arms"].values():
                ms = arm["step_ms"]
                assert 0 < ms["q1"] <= ms["median"] <= ms["q3"]
                assert arm["steps"] >= FEWEST_ROUNDS * gain_map.FEWEST_STEPS
            times = {label: arm["step_ms"]["median"] for label, arm in point["arms"].items()}
            assert point | judge(times) == point
            assert point["plan"] is None

    def test_a_stored_map_is_printed_and_drawn_alike(
        self, files: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        again = tmp_path / "again.png"
        run_map("--from", files / "map.json", "--plot", again)
        assert (imread(again) == imread(files / "map.png")).all()
        *table, last = capsys.readouterr().out.splitlines()
        rows = [row.split() for row in table]
        assert any("auto is not timed, falls back" in row for row in table)
        assert ["batch", "context", "seq.", "ms", "microbatch", "auto", "best"] in rows
        assert [row[3:] for row in rows if row[:2] == ["1", "64"]] == [["-", "-", "-"]]
        assert [row[4:] for row in rows if row[:2] == ["4", "64"]] == [["-", "microbatch"]]
        assert json.loads(last)["benchmark"] == "map"

    def test_points_that_do_not_fit_are_listed(self, capsys: Capture) -> None:
        argv = ["--map", "--seconds", "0.01", "--modes", "sequential"]
        table, record = run(capsys, *argv, "--batches", "2", "2", "--contexts", "5000", "20")
        fits, too_long = record["shapes"][0]["points"]
        assert (fits["context"], too_long["context"]) == (20, 5000)
        assert fits["reason"] is None
        assert "4096" in too_long["reason"]
        assert any(line.split() == ["2", "5000", "does", "not", "fit"] for line in table)
        assert any(line.startswith("1 points in ") and "1 more" in line for line in table)

    def test_a_shape_that_does_not_fit_does_not_stop_the_map(
        self, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        def refuse(*args: object, **options: object) -> None:
            raise DoesNotFit("no memory left")

        monkeypatch.setattr(gain_map, "start_arms", refuse)
        run_map("--device", "cpu")
        assert "tiny: not measured, no memory left" in capsys.readouterr().out

    def test_a_point_has_the_plan_in_use_and_its_steps(
        self, monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        pretend_planner(monkeypatch)
        argv = ["--map", "--seconds", "0.01", "--modes", "auto", "--contexts", "16"]
        table, record = run(capsys, *argv, "--batches", "2")
        (point,) = record["shapes"][0]["points"]
        assert point["plan"] == "green 36+96"
        # Without the steps of its first turn, which tells how many rounds there are.
        assert point["plan_steps"] == {"green 36+96": point["output"] * FEWEST_ROUNDS}
        assert any("auto's plan" in line for line in table)


class TestGains:
    def test_best_is_neither_sequential_nor_auto(self) -> None:
        verdict = judge({"sequential": 2.0, "streams": 2.5, "green 36+96": 1.6, "auto": 1.5})
        gains = {"streams": 0.8, "green 36+96": 1.25, "auto": 4 / 3}
        assert verdict["gains"] == pytest.approx(gains)
        assert (verdict["best"], verdict["best_gain"]) == ("green 36+96", 1.25)
        assert verdict["auto_of_best"] == 1

    @pytest.mark.parametrize(
        ("times", "holds"),
        [
            ({"sequential": 1.0, "auto": 1.009}, True),
            ({"sequential": 1.0, "auto": 1.011}, False),
            ({"sequential": 1.0, "green": 0.8, "auto": 0.815}, True),
            ({"sequential": 1.0, "green": 0.8, "auto": 0.817}, False),
            ({"sequential": 1.0, "green": 0.8}, None),
        ],
    )
    def test_what_auto_promises(self, times: dict[str, float], holds: bool | None) -> None:
        assert judge(times)["auto_holds"] is holds

    def test_the_summary_finds_the_extremes(self) -> None:
        small = [
            make_point(1, 128, sequential=1.0, auto=1.02),
            make_point(8, 128, sequential=1.0, streams=0.99, auto=1.0),
        ]
        large = [
            make_point(8, 128, sequential=1.0, streams=0.8, green_36P96=0.9, auto=0.85),
            make_point(8, 512, sequential=1.0, streams=1.1, auto=1.0),
            gain_map.unmeasured_point(8, 8192, "too large"),
        ]
        shapes = [make_shape("0.6B", small), make_shape("8B", large)]
        summary = summarize(shapes)
        assert (summary["points"], summary["not_measured"]) == (4, 1)
        worst, best = summary["worst_auto"], summary["best"]
        assert (worst["shape"], worst["batch"], worst["context"]) == ("0.6B", 1, 128)
        assert (best["shape"], best["context"], best["best"]) == ("8B", 128, "streams")
        fails = [(fail["shape"], fail["batch"]) for fail in summary["auto_fails"]]
        assert fails == [("0.6B", 1), ("8B", 8)]
        text = describe(make_map(*shapes))
        for part in ("4 points", "1 more", "1.250 by streams", "0.980", "0.941", "or more: 1"):
            assert part in text

    def test_maps_of_before_there_were_plans(self) -> None:
        old = make_point(8, 128, sequential=1.0, auto=1.0)
        assert "auto's plan" not in describe(make_map(make_shape("8B", [old])))
        new = make_point(8, 512, sequential=1.0, auto=1.0) | {"plan": "streams"}
        rows = describe(make_map(make_shape("8B", [old, new]))).splitlines()
        assert [row.split()[-2] for row in rows if row.startswith("8 ")] == ["-", "streams"]


class TestJoin:
    def join(self, directory: Path, *maps: dict[str, Any]) -> dict[str, Any]:
        paths = [directory / f"{i}.json" for i in range(len(maps))]
        for path, record in zip(paths, maps, strict=True):
            report.write_record(record, path)
        return gain_map.read_map(paths)

    def test_of_a_point_in_two_files_the_last_counts(self, tmp_path: Path) -> None:
        old = make_point(8, 128, sequential=1.0, streams=2.0)
        new = make_point(8, 128, sequential=1.0, streams=0.5)
        extra = make_point(8, 512, sequential=1.0, streams=0.9)
        first = make_map(make_shape("8B", [old]), make_shape("4B", [old]))
        second = make_map(make_shape("14B", [extra]), make_shape("8B", [new, extra]))
        second |= {"date": "2026-11-24T10:00:00+00:00", "seconds_per_arm": 1.0}
        record = self.join(tmp_path, first, second)
        points = {shape["name"]: shape["points"] for shape in record["shapes"]}
        assert points == {"4B": [old], "8B": [new, extra], "14B": [extra]}
        assert [*points] == ["4B", "8B", "14B"], "shapes are not ordered by size"
        dates = [shape["date"] for shape in record["shapes"]]
        assert dates == [first["date"], second["date"], second["date"]]
        assert (record["seconds_per_arm"], record["sweep_seconds"]) == (0.3, 200)
        assert record["summary"] == summarize(record["shapes"])

    def test_new_arms_come_first_in_their_order(self, tmp_path: Path) -> None:
        old, new = make_shape("8B", []), make_shape("8B", [])
        sequential, streams, green, auto = old["arms"]
        old["arms"], new["arms"] = [sequential, streams], [sequential, auto, green]
        (shape,) = self.join(tmp_path, make_map(old), make_map(new))["shapes"]
        assert shape["arms"] == [sequential, auto, green, streams]

    def test_not_of_two_machines_nor_with_other_layers(self, tmp_path: Path) -> None:
        shape = make_shape("8B", [])
        with pytest.raises(BenchError, match="device"):
            self.join(tmp_path, make_map(shape), make_map(shape, device="another"))
        fewer = shape | {"model": shape["model"] | {"layers": 4}}
        with pytest.raises(BenchError, match=r"8B .* layers"):
            self.join(tmp_path, make_map(shape), make_map(fewer))

    @pytest.mark.parametrize("text", ["", "[1]", '{"benchmark": "nano"}'])
    def test_a_file_with_something_else(self, text: str, tmp_path: Path, capsys: Capture) -> None:
        file = tmp_path / "other.json"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            run_map("--from", file)
        assert f"--from {file}" in capsys.readouterr().err


@pytest.mark.parametrize("shapes", [1, 2, 5])
@pytest.mark.parametrize("auto", [True, False])
def test_a_picture_is_readable_at_the_width_of_a_readme(
    shapes: int, auto: bool, tmp_path: Path
) -> None:
    names = ["0.6B", "1.7B", "4B", "8B", "14B"][:shapes]
    made = [random_shape(name, [1, 8, 32], [128, 512, 1024, 2048, 8192]) for name in names]
    if not auto:
        for point in (point for shape in made for point in shape["points"]):
            point["auto_gain"] = None
    draw_map(make_map(*made), tmp_path / "map.png")
    height, width, _ = imread(tmp_path / "map.png").shape
    assert 900 <= width <= 1500
    assert height > 300 * (1 + auto)
