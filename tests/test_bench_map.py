"""`nanovllm.bench --map`: measured on the CPU with the embedded model, and on made-up times."""

import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from nanovllm.bench import BenchError, DoesNotFit, gain_map, report
from nanovllm.bench import __main__ as bench
from nanovllm.bench.gains import describe, judge
from nanovllm.bench.pictures import draw_map
from nanovllm.bench.turns import FEWEST_ROUNDS
from tests.bench_runs import make_map, make_point, make_shape, pretend_planner, run

QUICK = ["--map", "--seconds", "0.01"]


class TestOnTheCpu:
    def test_every_point_is_measured_and_drawn_again_alike(self, tmp_path, capsys):
        file, picture, again = (tmp_path / name for name in ("m.json", "m.png", "again.png"))
        bench.main([*QUICK, "--device", "cpu", "--json", str(file), "--plot", str(picture)])
        record = report.read_record(file, "map")
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
        capsys.readouterr()
        table, _ = run(capsys, "--map", "--from", file, "--plot", again)
        assert (imread(again) == imread(picture)).all()
        rows = [row.split() for row in table]
        assert any("auto is not timed, falls back" in row for row in table)
        assert ["batch", "context", "seq.", "ms", "microbatch", "auto", "best"] in rows
        assert [row[3:] for row in rows if row[:2] == ["1", "64"]] == [["-", "-", "-"]]
        assert [row[4:] for row in rows if row[:2] == ["4", "64"]] == [["-", "microbatch"]]

    def test_points_that_do_not_fit_are_listed(self, capsys):
        argv = ["--modes", "sequential", "--batches", "2", "2", "--contexts", "5000", "20"]
        table, record = run(capsys, *QUICK, *argv)
        fits, too_long = record["shapes"][0]["points"]
        assert (fits["context"], too_long["context"]) == (20, 5000)
        assert fits["reason"] is None
        assert "4096" in too_long["reason"]
        assert any(line.split() == ["2", "5000", "does", "not", "fit"] for line in table)
        assert any(line.startswith("1 points in ") and "1 more" in line for line in table)

    def test_a_shape_that_does_not_fit_does_not_stop_the_map(self, monkeypatch, capsys):
        def refuse(*args: object, **options: object) -> None:
            raise DoesNotFit("no memory left")

        monkeypatch.setattr(gain_map, "start_arms", refuse)
        table, _ = run(capsys, *QUICK)
        assert "tiny: not measured, no memory left" in table

    def test_a_point_has_the_plan_in_use(self, monkeypatch, capsys):
        pretend_planner(monkeypatch)
        argv = ["--modes", "auto", "--contexts", "16", "--batches", "2"]
        table, record = run(capsys, *QUICK, *argv)
        (point,) = record["shapes"][0]["points"]
        assert point["plan"] == "green 36+96"
        assert any("auto's plan" in line for line in table)


class TestGains:
    def test_best_is_neither_sequential_nor_auto(self):
        times = {"sequential": 2.0, "streams": 2.5, "green_36P96": 1.6, "auto": 1.5}
        (point,) = judge(make_shape("8B", [make_point(8, 128, **times)]))
        gains = {"streams": 0.8, "green 36+96": 1.25, "auto": 4 / 3}
        assert point.gains == pytest.approx(gains)
        assert (point.best, point.best_gain) == ("green 36+96", 1.25)
        assert point.auto_of_best == 1

    @pytest.mark.parametrize(
        ("times", "fails"),
        [
            ({"sequential": 1.0, "auto": 1.009}, False),
            ({"sequential": 1.0, "auto": 1.011}, True),
            ({"sequential": 1.0, "green": 0.8, "auto": 0.815}, False),
            ({"sequential": 1.0, "green": 0.8, "auto": 0.817}, True),
            ({"sequential": 1.0, "green": 0.8}, False),
        ],
    )
    def test_what_auto_promises(self, times, fails):
        (point,) = judge(make_shape("8B", [make_point(8, 128, **times)]))
        assert point.auto_fails is fails

    def test_the_summary_finds_the_extremes(self):
        small = [
            make_point(1, 128, sequential=1.0, auto=1.02),
            make_point(8, 128, sequential=1.0, streams=0.99, auto=1.0),
        ]
        large = [
            make_point(8, 128, sequential=1.0, streams=0.8, green_36P96=0.9, auto=0.85),
            make_point(8, 512, sequential=1.0, streams=1.1, auto=1.0) | {"plan": "streams"},
            gain_map.unmeasured_point(8, 8192, "too large"),
        ]
        text = describe(make_map(make_shape("0.6B", small), make_shape("8B", large)))
        *rows, gains, best = text.splitlines()
        assert any(row.startswith("4 points in 100 s") and "1 more" in row for row in rows)
        assert any("at 2 of 4 points; worst: 0.980, 0.6B batch 1 context 128" in r for r in rows)
        assert "  not at 8B batch 8 context 128: 1.176, 0.941 of the best" in rows
        assert gains == "best gains, at least 1.05:"
        assert best == "  1.250 at 8B batch 8 context 128, by streams"
        # Old maps know no plans.
        assert [row.split()[-2] for row in rows if row.startswith("8 ")][1:3] == ["!", "streams"]


def test_a_record_goes_where_a_link_points_and_a_pipe_stays_one(tmp_path):
    file, link, pipe = (tmp_path / name for name in ("record.json", "link.json", "pipe"))
    file.write_text("old")
    link.symlink_to(file)
    os.mkfifo(pipe)
    report.write_record({"benchmark": "map"}, link)
    assert link.is_symlink()
    assert json.loads(file.read_text()) == {"benchmark": "map"}
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    read: list[str] = []
    reader.start()
    report.write_record({"benchmark": "map"}, pipe)
    reader.join(60)
    assert pipe.is_fifo()
    assert json.loads(read[0]) == {"benchmark": "map"}


class TestJoin:
    def join(self, directory: Path, *maps: dict[str, Any]) -> dict[str, Any]:
        paths = [directory / f"{i}.json" for i in range(len(maps))]
        for path, record in zip(paths, maps, strict=True):
            report.write_record(record, path)
        return gain_map.read_map(paths)

    def test_shapes_are_ordered_and_the_last_of_a_name_counts(self, tmp_path):
        old = make_point(8, 128, sequential=1.0, streams=2.0)
        new = make_point(8, 128, sequential=1.0, streams=0.5)
        first = make_map(make_shape("8B", [old]), make_shape("4B", [old]))
        second = make_map(make_shape("14B", [new]), make_shape("8B", [new]))
        second |= {"date": "2026-11-24T10:00:00+00:00", "seconds_per_arm": 1.0}
        record = self.join(tmp_path, first, second)
        points = [(shape["name"], shape["points"]) for shape in record["shapes"]]
        assert points == [("4B", [old]), ("8B", [new]), ("14B", [new])]
        dates = [shape["date"] for shape in record["shapes"]]
        assert dates == [first["date"], second["date"], second["date"]]
        assert (record["seconds_per_arm"], record["sweep_seconds"]) == (0.3, 200)

    def test_not_of_two_machines(self, tmp_path):
        shape = make_shape("8B", [])
        with pytest.raises(BenchError, match="device"):
            self.join(tmp_path, make_map(shape), make_map(shape, device="another"))

    @pytest.mark.parametrize("text", ["", "[1]", '{"benchmark": "nano"}'])
    def test_a_file_with_something_else(self, text, tmp_path):
        file = tmp_path / "other.json"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(BenchError, match=str(file)):
            gain_map.read_map([file])

    @pytest.mark.parametrize(
        "damage",
        [
            lambda record: record.update(shapes=[]),
            lambda record: record.update(date=5),
            lambda record: record["shapes"][0].update(points=[]),
            lambda record: record["shapes"][0]["points"][0].update(batch="x"),
            lambda record: record["shapes"][0]["points"][0].pop("arms"),
        ],
    )
    def test_a_damaged_map(self, damage, tmp_path):
        points = [make_point(batch, 128, sequential=1.0, streams=2.0) for batch in (8, 32)]
        record = make_map(make_shape("8B", points))
        assert self.join(tmp_path, record)
        damage(record)
        with pytest.raises(BenchError, match=r"0\.json holds a damaged map"):
            self.join(tmp_path, record)


@pytest.mark.parametrize("shapes", [1, 2, 5])
@pytest.mark.parametrize("auto", [True, False])
def test_a_picture_is_readable_at_the_width_of_a_readme(shapes, auto, tmp_path):
    """Points of random times, except that 1 sequence cannot be cut and the last does not fit."""
    names = ["0.6B", "1.7B", "4B", "8B", "14B"][:shapes]
    places = [(batch, context) for batch in (1, 8, 32) for context in (128, 512, 1024, 2048)]
    points = [gain_map.unmeasured_point(32, 8192, "it is too large")]
    for batch, context in places:
        arms = ("streams", "green_36P96") * (batch > 1) + ("auto",) * auto
        times = {arm: random.uniform(1.5, 3) for arm in arms}
        points.append(make_point(batch, context, sequential=2.0, **times))
    draw_map(make_map(*(make_shape(name, points) for name in names)), tmp_path / "map.png")
    height, width, _ = imread(tmp_path / "map.png").shape
    assert 900 <= width <= 1500
    assert height > 300 * (1 + auto)
