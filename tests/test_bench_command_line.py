"""The command line of `bench_pipeline.py`: what it refuses, its help, documents, interrupts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_pipeline
from nanovllm import LLM
from nanovllm.bench import engines, gain_map, options

ROOT = Path(bench_pipeline.__file__).parent
GROW = ["--workload", "growing", "--batch", "3", "--context", "10", "--until", "60",
        "--stages", "2", "--output", "6"]  # fmt: skip

Capture = pytest.CaptureFixture[str]


def refuse(capsys: Capture, *argv: object) -> str:
    """The one line on stderr with which bench_pipeline.py ends at once."""
    device = [] if "--device" in argv else ["--device", "cpu"]
    with pytest.raises(SystemExit) as error:
        bench_pipeline.main([*device, *map(str, argv)])
    out, err = capsys.readouterr()
    assert error.value.code == 2
    assert not out
    assert len(err.splitlines()) == 1
    return err


class TestRefusals:
    @pytest.mark.parametrize(
        ("argv", "words"),
        [
            (["--batch", "0"], ["--batch", "0", "above 0"]),
            (["--batch", "many"], ["--batch", "many"]),
            (["--seconds", "nan"], ["--seconds", "nan"]),
            (["--shape", "7B"], ["--shape", "7B", "32B"]),
            (["--modes", "fast"], ["--modes", "fast", "green"]),
            (["--shape", "8B", "--model", "m"], ["--shape", "--model"]),
            (["--layers", "2"], ["--layers", "--shape"]),
            (["--requests", "2"], ["--requests", "throughput", "not of decode"]),
            (["--workload", "nano", "--batch", "2"], ["--batch", "decode"]),
            (["--workload", "nano", "--map"], ["--map", "--workload"]),
            (["--workload", "nano", "--requests", "0"], ["--requests", "0"]),
            (["--workload", "nano", "--requests", "W"], ["--requests", "W"]),
            (["--workload", "throughput", "--requests", "9"], ["--requests", "9", "steady"]),
            (["--workload", "prefill", "--sync"], ["--sync", "decode"]),
            (["--workload", "prefill", "--tokens", "5000"], ["5001", "4096"]),
            (["--output", "4"], ["output=4", "5"]),
            (["--context", "4090"], ["4107", "4096"]),
            (["--device", "tpu"], ["device='tpu'", "cuda"]),
            (["--json", "nowhere/at/all.json"], ["--json", "nowhere/at"]),
            (["--json", "."], ["--json"]),
            (["--timeline", "steps.txt"], ["--timeline", ".png", ".json"]),
            (["--power"], ["--power", "cpu"]),
            (["--splits", "36-96"], ["--splits"]),
            ([*GROW, "--until", "10"], ["until=10", "context=10"]),
            ([*GROW, "--stages", "40"], ["stages=40", "50"]),
            ([*GROW, "--until", "9000"], ["4096"]),
            (["--map", "--splits", "36-96"], ["36-96", "36+96"]),
            (["--map", "--splits", "36+96"], ["--splits", "green"]),
            (["--map", "--shapes", "tiny", "8B", "--layers", "2"], ["--layers", "tiny"]),
            (["--map", "--plot", "map.pdf"], ["--plot", "map.pdf", ".png"]),
            (["--map", "--from", "m.json", "--seconds", "1"], ["--seconds", "--from"]),
            (["--map", "--from", "nowhere.json"], ["--from", "nowhere.json"]),
            (["--curves"], ["CUDA", "cpu"]),
            (["--curves", "--from", "a.json", "b.json"], ["--from", "one"]),
            (["--curves", "--shape", "8B"], ["--shape", "curves"]),
            (["--modes", "green", "auto", "--tensor-parallel-size", "2"], ["2", "green", "auto"]),
        ],
        ids=" ".join,
    )
    def test_say_why_in_a_line_before_anything_is_loaded(
        self, argv: list[str], words: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engines, "LLMEngine", None)
        err = refuse(capsys, *argv)
        assert all(word in err for word in words), err

    def test_a_directory_without_a_model(self, tmp_path: Path, capsys: Capture) -> None:
        assert "config.json" in refuse(capsys, "--model", tmp_path)

    def test_a_picture_without_matplotlib(
        self, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "matplotlib" in refuse(capsys, "--map", "--plot", "map.png")

    def test_prefixes_that_were_never_computed_are_not_handed_on(self) -> None:
        with (
            LLM(device="cpu", num_kvcache_blocks=4) as engine,
            pytest.raises(ValueError, match="enable_prefix_caching"),
        ):
            engine.add_computed_request([1, 2, 3])

    def test_every_option_has_a_help(self) -> None:
        for action in options.make_parser(None)._actions:
            assert action.help, action.option_strings

    def test_the_largest_growing_run_fits_a_gpu_by_default(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(options, "resolve_device", lambda name: torch.device("cuda", 0))
        args = options.parse(None, ["--workload", "growing"])
        assert (args.shape, args.layers) == ("0.6B", 14)
        for argv, layers in ((["--shape", "0.6B"], None), (["--layers", "28"], 28)):
            args = options.parse(None, ["--workload", "growing", *argv])
            assert (args.shape, args.layers) == ("0.6B", layers)


def test_commands_of_the_documents_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(options, "check_power", lambda device: None)
    monkeypatch.chdir(ROOT)
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    commands = re.findall(r"^    python bench_pipeline.py (.*)$", text, re.MULTILINE)
    commands += re.findall(
        r"^python bench_pipeline.py (.*?)(?:  .*)?$", bench_pipeline.__doc__ or "", re.M
    )
    assert len(commands) > 8
    for command in commands:
        if command.strip().startswith("-"):
            assert options.parse(None, command.split()).workload in bench_pipeline.WORKLOADS


def test_what_is_measured_at_an_interrupt_is_printed(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure, calls = gain_map.measure_point, []

    def third_is_interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(gain_map, "measure_point", third_is_interrupted)
    file = tmp_path / "map.json"
    with pytest.raises(SystemExit) as error:
        bench_pipeline.main(["--map", "--device", "cpu", "--seconds", "0.01", "--json", str(file)])
    assert error.value.code == 130
    out, err = capsys.readouterr()
    assert "2 points in " in out
    assert "Traceback" not in err
    assert len(json.loads(file.read_text())["shapes"][0]["points"]) == 2
