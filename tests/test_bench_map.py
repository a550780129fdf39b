"""`bench_pipeline.py --map`: measured on the CPU with the embedded model; judged on made-up times.

Run with `pytest tests/test_bench_map.py`; it takes some seconds.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

import bench_pipeline
from nanovllm import LLM
from nanovllm.bench import BenchError, DoesNotFit, sweep
from nanovllm.bench.arms import Arm, ArmSpec
from nanovllm.bench.compare import FEWEST_ROUNDS, gather, in_order, run_turns
from nanovllm.bench.gains import judge, regions, summarize
from nanovllm.bench.heat_map import draw_map
from nanovllm.bench.map_report import format_map
from nanovllm.bench.stored import read_map, write_record
from nanovllm.bench.sweep import FEWEST_STEPS, MOST_STEPS, plan_turns
from nanovllm.bench.workload import EDGE_STEPS, DecodeWorkload, fill_cache
from nanovllm.engine.pipeline_statistics import PipelineStatistics

LABELS = ("sequential", "streams", "green 36+96", "auto")
BATCHES = {"0.6B": [1, 8, 32], "14B": [1, 8]}
CONTEXTS = {"0.6B": [128, 512], "14B": [128, 512, 1024]}


def run_map(*argv: object) -> None:
    """bench_pipeline.py --map."""
    bench_pipeline.main(["--map", *map(str, argv)])


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
                "attention_sms": 36 if "+" in label else None,
                "ffn_sms": 96 if "+" in label else None,
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
    points.append(sweep.unmeasured_point(last["batch"], last["context"], "it is too large"))
    return make_shape(name, points)


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
            return as_dict(self) | {"planner": {"plan": plan, "switches": 1, "plans": {}}}

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
        (head,) = (line for line in table if line.startswith("batch"))
        assert head.endswith("  auto's plan  best")
        rows = [line.split() for line in table if line.split()[1:2] == ["16"]]
        assert [row[4] for row in rows] == ["36+96", "sequential"]

    def test_without_a_planner_there_is_neither_plan_nor_column(
        self, record: dict[str, Any]
    ) -> None:
        assert all(point["plan"] is None for point in record["shapes"][0]["points"])
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
        decode: Any = SimpleNamespace(pipeline=SimpleNamespace(statistics=statistics))
        runner: Any = None
        assert Arm(ArmSpec("auto"), runner, decode).plan is None


class TestTurns:
    def test_slow_steps_are_few(self) -> None:
        assert plan_turns(0.03, 0.3) == (FEWEST_STEPS + 2 * EDGE_STEPS, FEWEST_ROUNDS)

    def test_fast_steps_are_many_but_not_too_many(self) -> None:
        assert plan_turns(0.0005, 0.3) == (MOST_STEPS + 2 * EDGE_STEPS, 10)

    def test_between_them_a_turn_of_the_fastest_arm_takes_a_tenth_of_a_second(self) -> None:
        assert plan_turns(0.005, 0.9) == (20 + 2 * EDGE_STEPS, 10)

    @pytest.mark.parametrize("seed", range(20))
    def test_rounds_fill_the_time_and_are_even(self, seed: int) -> None:
        rng = random.Random(seed)
        step, seconds = rng.uniform(0.0002, 0.05), rng.uniform(0.01, 3)
        output, rounds = plan_turns(step, seconds)
        assert rounds % 2 == 0
        assert rounds * (output - 2 * EDGE_STEPS) * step >= seconds * 0.999

    def test_arms_take_turns_back_and_forth_beginning_with_each(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        order: list[str] = []

        def arm(label: str) -> Any:
            return SimpleNamespace(label=label, activate=lambda: order.append(label))

        monkeypatch.setattr("nanovllm.bench.compare.run_turn", lambda *_: [1.0, 3.0])
        runner = SimpleNamespace(model_config=SimpleNamespace(vocab_size=9))
        engine: Any = SimpleNamespace(model_runner=runner)
        arms, workload = [arm(label) for label in "abc"], DecodeWorkload(2, 3, 5)
        times = gather(run_turns(engine, arms, workload, 7))
        assert order == [*"abccbabcaacbcabbacabc"]
        assert {label: t.count for label, t in times.items()} == dict.fromkeys("abc", 14)
        assert times["a"].median == 2

    @pytest.mark.parametrize("count", range(1, 8))
    def test_every_arm_has_every_place_equally_often(self, count: int) -> None:
        arms: Any = range(count)
        rounds = [in_order(arms, number) for number in range(2 * count)]
        for places in zip(*rounds, strict=True):
            assert sorted(places) == sorted([*arms, *arms])

    @pytest.mark.parametrize("rounds", [2, 4, 6])
    def test_a_steady_drift_is_the_same_for_all(self, rounds: int) -> None:
        arms: Any = range(5)
        turns = [arm for number in range(rounds) for arm in in_order(arms, number)]
        moments = [sum(i for i, arm in enumerate(turns) if arm == one) for one in arms]
        assert len(set(moments)) == 1

    def test_a_point_leaves_nothing_behind(self) -> None:
        workload = DecodeWorkload(batch=4, context=300, output=sweep.LONGEST_OUTPUT)
        with LLM(
            device="cpu", num_kvcache_blocks=workload.blocks(256), enable_prefix_caching=False
        ) as engine:
            fill_cache(engine)
            arms = [ArmSpec("sequential")]
            with sweep.open_arms(engine, arms) as opened:
                bar: Any = SimpleNamespace(set_postfix_str=lambda text: None, update=lambda: None)
                point = sweep.measure_point(engine, opened, 4, 300, 0.001, bar)
            assert point["arms"]["sequential"]["steps"] == FEWEST_ROUNDS * FEWEST_STEPS
            assert engine.is_finished()
            assert engine.scheduler.num_preemptions == 0
            assert len(engine.scheduler.blocks.free) == engine.model_runner.num_blocks


class TestGains:
    def test_best_is_neither_sequential_nor_auto(self) -> None:
        verdict = judge({"sequential": 2.0, "streams": 2.5, "green 36+96": 1.6, "auto": 1.5})
        assert verdict["gains"] == pytest.approx(
            {"streams": 0.8, "green 36+96": 1.25, "auto": 4 / 3}
        )
        assert (verdict["best"], verdict["best_gain"]) == ("green 36+96", 1.25)
        assert verdict["auto_gain"] == pytest.approx(4 / 3)
        assert verdict["auto_of_best"] == 1
        assert verdict["auto_holds"]

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

    @pytest.mark.parametrize("seed", range(20))
    def test_regions_are_those_of_a_plain_search(self, seed: int) -> None:
        """Against labels that spread to neighbours until nothing changes."""
        draw = random.Random(seed)
        batches, contexts = [1, 8, 32, 128, 256], [128, 512, 1024, 2048]
        points = [
            make_point(b, c, sequential=1.0, streams=1 / draw.choice([1.2, 1.06, 1.04, 0.7]))
            for b in batches
            for c in contexts
        ]
        draw.shuffle(points)
        gains = {
            (batches.index(p["batch"]), contexts.index(p["context"])): p["best_gain"]
            for p in points
        }
        label = {cell: i for i, (cell, gain) in enumerate(gains.items()) if gain >= 1.05}
        changed = True
        while changed:
            changed = False
            for a in label:
                for b in label:
                    near = abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1
                    if near and label[b] > label[a]:
                        label[b], changed = label[a], True
        expected = {
            frozenset((batches[i], contexts[j]) for (i, j), n in label.items() if n == number)
            for number in set(label.values())
        }
        found = regions(make_shape("8B", points))
        assert {frozenset(map(tuple, region["cells"])) for region in found} == expected
        sizes = [len(region["cells"]) for region in found]
        assert sizes == sorted(sizes, reverse=True)
        for region in found:
            cells = [tuple(cell) for cell in region["cells"]]
            inside = [p["best_gain"] for p in points if (p["batch"], p["context"]) in cells]
            assert (region["least_gain"], region["most_gain"]) == (min(inside), max(inside))

    def test_the_summary_finds_the_extremes(self) -> None:
        shapes = [
            make_shape(
                "0.6B",
                [
                    make_point(1, 128, sequential=1.0, auto=1.02),
                    make_point(8, 128, sequential=1.0, streams=0.99, auto=1.0),
                ],
            ),
            make_shape(
                "8B",
                [
                    make_point(8, 128, sequential=1.0, streams=0.8, green_36P96=0.9, auto=0.85),
                    make_point(8, 512, sequential=1.0, streams=1.1, auto=1.0),
                    sweep.unmeasured_point(8, 8192, "too large"),
                ],
            ),
        ]
        summary = summarize(shapes)
        assert (summary["points"], summary["not_measured"]) == (4, 1)
        worst = summary["worst_auto"]
        assert (worst["shape"], worst["batch"], worst["context"]) == ("0.6B", 1, 128)
        best = summary["best"]
        assert (best["shape"], best["context"], best["best"]) == ("8B", 128, "streams")
        assert [(fail["shape"], fail["batch"]) for fail in summary["auto_fails"]] == [
            ("0.6B", 1),
            ("8B", 8),
        ]
        text = format_map(make_map(*shapes))
        assert "4 points in 100 s, 0.3 s of steps an arm; 1 more do not fit" in text
        assert "best gain: 1.250 by streams, 8B batch 8 context 128" in text
        assert "worst auto: 0.980, 0.6B batch 1 context 128" in text
        assert "  not at 8B batch 8 context 128: 1.176, 0.941 of the best" in text
        assert "gain 1.05 or more: 8B, batch 8 to 8, context 128 to 128: 1 point, 1.250" in text


class TestPicture:
    @pytest.fixture
    def figure(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Where drawn figures are put, instead of in a file."""
        figures: list[Any] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
        return figures

    def test_every_point_is_in_its_cell(self, figure: list[Any]) -> None:
        shapes = [random_shape(name, BATCHES[name], CONTEXTS[name]) for name in BATCHES]
        draw_map(make_map(*shapes), Path("map.png"))
        panels = figure[0].axes[:4]
        for panel, shape, field in zip(
            panels, shapes * 2, ["best_gain"] * 2 + ["auto_gain"] * 2, strict=True
        ):
            assert panel.get_title().startswith(f"{shape['name']}: ")
            contexts, batches = CONTEXTS[shape["name"]], BATCHES[shape["name"]]
            assert [label.get_text() for label in panel.get_yticklabels()] == [*map(str, batches)]
            if panel in panels[2:]:
                texts = [label.get_text() for label in panel.get_xticklabels()]
                assert texts == [*map(str, contexts)]
            numbers = {}
            for text in panel.texts:
                if text.get_fontsize() > 8:
                    x, y = text.get_position()
                    numbers[batches[round(y)], contexts[round(x)]] = text.get_text()
            assert numbers == {
                (point["batch"], point["context"]): "-"
                if point[field] is None
                else f"{point[field]:.2f}"
                for point in shape["points"]
                if point["reason"] is None
            }
            hatched = [patch for patch in panel.patches if patch.get_hatch()]
            assert [patch.get_xy() for patch in hatched] == [
                (len(contexts) - 1.5, len(batches) - 1.5)
            ]

    def test_colours_tell_gain_from_loss_and_labels_the_arm(self, figure: list[Any]) -> None:
        points = [
            make_point(8, 128, sequential=1.0, green_36P96=0.8),
            make_point(8, 512, sequential=1.0, microbatch=1.25),
            make_point(8, 1024, sequential=1.0, streams=1.0),
        ]
        draw_map(make_map(make_shape("8B", points)), Path("map.png"))
        panel = figure[0].axes[0]
        gain, loss, same = (patch.get_facecolor() for patch in panel.patches)
        assert gain[2] > gain[0]
        assert loss[0] > loss[2]
        assert min(same[:3]) > 0.95
        assert {text.get_text() for text in panel.texts} >= {"36+96", "2 parts", "streams"}

    def test_the_title_says_where_and_when(self, figure: list[Any]) -> None:
        draw_map(make_map(random_shape("8B", [1, 8], [128])), Path("map.png"))
        title = figure[0].get_suptitle()
        assert title.endswith(
            "NVIDIA Something, driver 580.1, torch 2.11.0, triton 3.6.0, 2026-11-23"
        )


class TestStored:
    def test_maps_of_several_files_are_one(self, tmp_path: Path) -> None:
        old = make_point(8, 128, sequential=1.0, streams=2.0)
        new = make_point(8, 128, sequential=1.0, streams=0.5)
        extra = make_point(8, 512, sequential=1.0, streams=0.9)
        write_record(make_map(make_shape("8B", [old])), tmp_path / "a.json")
        write_record(
            make_map(make_shape("14B", [extra]), make_shape("8B", [new, extra])),
            tmp_path / "b.json",
        )
        record = read_map([tmp_path / "a.json", tmp_path / "b.json"])
        assert {shape["name"]: shape["points"] for shape in record["shapes"]} == {
            "8B": [new, extra],
            "14B": [extra],
        }
        assert record["sweep_seconds"] == 200
        assert record["summary"] == summarize(record["shapes"])

    def test_not_of_two_machines(self, tmp_path: Path) -> None:
        shape = make_shape("8B", [])
        write_record(make_map(shape), tmp_path / "a.json")
        write_record(make_map(shape, device="another"), tmp_path / "b.json")
        with pytest.raises(BenchError, match="device differ"):
            read_map([tmp_path / "a.json", tmp_path / "b.json"])

    def test_not_with_other_layers(self, tmp_path: Path) -> None:
        shape = make_shape("8B", [])
        write_record(make_map(shape), tmp_path / "a.json")
        shape["model"]["layers"] = 4
        write_record(make_map(shape), tmp_path / "b.json")
        with pytest.raises(BenchError, match="8B does not have as many layers"):
            read_map([tmp_path / "a.json", tmp_path / "b.json"])

    @pytest.mark.parametrize("text", ["", "[1]", '{"benchmark": "nano"}'])
    def test_a_file_with_something_else(
        self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "other.json"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            run_map("--from", file)
        assert f"--from {file}" in capsys.readouterr().err


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
