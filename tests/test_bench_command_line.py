"""The command line of `python -m nanovllm.bench`: what it refuses, its help, interrupts."""

import json
from typing import Any

import pytest

from nanovllm.bench import __main__ as bench
from nanovllm.bench import engines, gain_map, options, turns
from tests.bench_runs import GROW, refusal, without_text
from tests.measured_map import RECORD


def refuse(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line on stderr with which it ends at once."""
    device = [] if "--device" in argv else ["--device", "cpu"]
    return refusal(capsys, bench.main, *device, *argv)


class TestRefusals:
    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--batch", "0"], ["--batch", "0", "at least 1"]),
            (["--batch", "many"], ["--batch", "many"]),
            (["--seconds", "nan"], ["--seconds", "nan"]),
            (["--output", "4"], ["--output", "4", "5"]),
            (["--shape", "7B"], ["--shape", "7B", "32B"]),
            (["--modes", "fast"], ["--modes", "fast", "green"]),
            (["--shape", "8B", "--model", "m"], ["--shape", "--model"]),
            (["--layers", "2"], ["--layers", "checkpoint"]),
            (["--workload", "nano", "--batch", "2"], ["nano", "--batch 2"]),
            (["--workload", "nano", "--map"], ["--map", "--workload"]),
            (["--workload", "throughput", "--requests", "9"], ["--requests", "9", "steady"]),
            (["--context", "4090"], ["4099", "4096"]),
            (["--device", "tpu"], ["device='tpu'", "cuda"]),
            (["--json", "nowhere/at/all.json"], ["--json", "nowhere/at"]),
            (["--json", "/"], ["--json", "is a directory"]),
            (["--timeline", "steps.txt"], ["--timeline", ".png", ".json"]),
            (["--timeline", "s.json", "--tensor-parallel-size", "2"], ["--timeline"]),
            (["--power"], ["--power", "cpu"]),
            ([*GROW, "--until", "10"], ["--until 10", "--context 10"]),
            ([*GROW, "--until", "9000"], ["4096"]),
            (["--map", "--splits", "36-96"], ["--splits", "36-96", "36+96"]),
            (["--map", "--shapes", "tiny", "8B", "--layers", "2"], ["--layers"]),
            (["--map", "--plot", "map.pdf"], ["--plot", "map.pdf", ".png"]),
            (["--map", "--from", "nowhere.json"], ["nowhere.json", "missing"]),
            (["--map", "--json", "m.png", "--plot", "m.png"], ["--json", "--plot", "different"]),
            (["--timeline", "s.json", "--json", "./s.json"], ["--timeline", "different"]),
            (["--map", "--from", "s.json", "--json", "s.json"], ["--from", "different"]),
            ([*GROW, "--output", "20"], ["--output 20", "--context 10"]),
            (["--model", ""], ["config.json"]),
            (["--curves"], ["CUDA", "cpu"]),
        ],
        ids=" ".join,
    )
    def test_say_why_in_a_line_before_anything_is_loaded(self, argv, words, capsys, monkeypatch):
        monkeypatch.setattr(engines, "LLMEngine", None)
        err = refuse(capsys, *argv)
        assert all(word in err for word in words), err

    @pytest.mark.parametrize(
        "change",
        [{"device": ...}, {"shapes": [{"name": "7B"}]}, {"shapes": "x"}, {"sweep_seconds": None}],
    )
    def test_a_damaged_map(self, tmp_path, capsys, change):
        record = json.loads(RECORD.read_text("utf-8")) | change
        kept = {name: value for name, value in record.items() if value is not ...}
        (tmp_path / "map.json").write_text(json.dumps(kept), encoding="utf-8")
        assert "damaged" in refuse(capsys, "--map", "--from", tmp_path / "map.json")

    def test_a_directory_without_a_model(self, tmp_path, capsys):
        assert "config.json" in refuse(capsys, "--model", tmp_path)

    def test_a_picture_without_matplotlib(self, capsys, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "matplotlib" in refuse(capsys, "--map", "--plot", "map.png")


@pytest.mark.parametrize("workload", options.WORKLOADS)
def test_every_workload_has_a_help(workload, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--workload", workload, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in options.WORKLOADS[workload])
    assert not without_text(text)


def test_growing_that_is_interrupted_has_the_ranges_that_were_run(capsys, monkeypatch):
    run_turn = turns.run_turn
    contexts = set()

    def interrupted(engine: Any, workload: Any) -> Any:
        contexts.add(workload.context)
        if len(contexts) == 2:
            raise KeyboardInterrupt
        return run_turn(engine, workload)

    monkeypatch.setattr(turns, "run_turn", interrupted)
    modes = ["--modes", "sequential", "microbatch"]
    with pytest.raises(SystemExit, match="130"):
        bench.main(["--device", "cpu", *GROW, *modes])
    table, last = capsys.readouterr().out.rstrip("\n").rsplit("\n", 1)
    (stage,) = json.loads(last)["stages"]
    assert stage["arms"].keys() == {"sequential", "microbatch"}
    assert all(label in table for label in stage["arms"])


@pytest.mark.parametrize("failing", ["write", "draw"])
def test_what_is_measured_is_printed_when_it_cannot_be_written_or_drawn(
    failing, capsys, monkeypatch, tmp_path
):
    def fail(*args: Any) -> Any:
        raise OSError("no space left")

    place = (bench.report, "write_record") if failing == "write" else (gain_map, "draw")
    monkeypatch.setattr(*place, fail)
    argv = ["--batches", "1", "--contexts", "32", "--seconds", "0.01", "--modes", "sequential"]
    files = ["--json", tmp_path / "map.json", "--plot", tmp_path / "map.png"]
    with pytest.raises(SystemExit) as error:
        bench.main(["--map", "--device", "cpu", *argv, *map(str, files)])
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].endswith("error: no space left")
    text = out.splitlines()[-1] if failing == "write" else (tmp_path / "map.json").read_text()
    assert len(json.loads(text)["shapes"][0]["points"]) == 1


def test_what_is_measured_at_an_interrupt_is_printed(capsys, monkeypatch, tmp_path):
    measure, calls = gain_map.measure_point, []

    def third_is_interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(gain_map, "measure_point", third_is_interrupted)
    file = tmp_path / "map.json"
    with pytest.raises(SystemExit) as error:
        bench.main(["--map", "--device", "cpu", "--seconds", "0.01", "--json", str(file)])
    assert error.value.code == 130
    out, err = capsys.readouterr()
    assert "2 points in " in out
    assert "Traceback" not in err
    assert len(json.loads(file.read_text())["shapes"][0]["points"]) == 2
