"""Power beside step times, with a program in the place of nvidia-smi."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
import torch

import bench_pipeline
from nanovllm.bench import BenchError
from nanovllm.bench.compare import StepTimes, Turn
from nanovllm.bench.power import TIME_FORMAT, PowerLog, Reading, Sample, command_for, parse
from nanovllm.bench.report import power_record

# Prints a sample, or one every 10 ms: 100, 101, ... watts.
SAMPLER = """
import sys, time
from datetime import datetime

watts = 100
while True:
    now = datetime.now().strftime("%Y/%m/%d %H:%M:%S.%f")[:-3]
    print(f"{now}, {watts}.00, 1500", flush=True)
    if watts == 105:
        print("[N/A]", flush=True)
    if not any(argument.startswith("--loop-ms=") for argument in sys.argv):
        break
    watts += 1
    time.sleep(0.01)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "sampler.py"
    script.write_text(SAMPLER, encoding="utf-8")
    return [sys.executable, str(script)]


def test_a_line_is_a_sample() -> None:
    moment = datetime(2026, 11, 25, 16, 1, 2, 345000)
    line = f"{moment.strftime(TIME_FORMAT)[:-3]}, 683.21, 1485\n"
    assert parse(line) == Sample(moment.timestamp(), 683.21, 1485.0)
    for other in ("", "No devices were found", line.replace("1485", "[N/A]"), line + ", 3"):
        assert parse(other) is None


def test_samples_count_for_the_arm_whose_steps_ran(command: list[str]) -> None:
    def turns() -> Iterator[Turn]:
        time.sleep(0.3)  # of nobody
        for label in ("a", "b"):
            time.sleep(0.2)
            yield label, [0.05, 0.05]
        yield "short", [0.0]

    with PowerLog(command) as log:
        assert [label for label, _ in log.watch(turns())] == ["a", "b", "short"]
        readings = log.readings()
        first, second = readings["a"], readings["b"]
        assert log.samples[0].watts < first.watts < second.watts
        assert first.sm_mhz == second.sm_mhz == 1500.0
        for label, reading in (("a", first), ("b", second)):
            begin, end = log.turns[label][0]
            within = [s.watts for s in log.samples if begin <= s.moment <= end]
            assert reading.samples == len(within) >= 2
            assert reading.watts == pytest.approx(sum(within) / len(within))
    log.close()


def test_says_why_there_is_no_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = [sys.executable, "-c", "print('no such field'); raise SystemExit(2)"]
    with pytest.raises(BenchError, match="said 'no such field'"):
        PowerLog(fails)
    with pytest.raises(BenchError, match=r"--power needs a CUDA GPU, not cpu"):
        command_for(torch.device("cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="needs nvidia-smi"):
        command_for(torch.device("cuda", 0))


def test_the_benchmark_refuses_it_at_once_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_pipeline.main(["--device", "cpu", "--power"])
    assert "--power needs a CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench_pipeline.main(["--device", "cpu", "--workload", "growing", "--power"])
    assert "--power is an option of --workload decode only" in capsys.readouterr().err


def test_joules_are_watts_for_a_step() -> None:
    times = StepTimes(0.04, 0.039, 0.041, 30)
    record = power_record(Reading(700.0, 1490.0, 12), times)
    assert record == {
        "watts": 700.0,
        "sm_mhz": 1490.0,
        "samples": 12,
        "joules_per_step": pytest.approx(28.0),
    }
    assert power_record(None, times) is None
