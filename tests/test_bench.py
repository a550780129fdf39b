"""bench_pipeline.py on the CPU with the embedded model, and what its parts promise.

Run with `pytest tests/test_bench.py`; it takes some seconds.
"""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import bench_pipeline
from nanovllm import LLM
from nanovllm.bench import BenchError, nano
from nanovllm.bench.arms import ArmSpec, arm_specs, choose_split, open_arms
from nanovllm.bench.command_line import MODES
from nanovllm.bench.floor import Floor, kv_bytes_per_token, weight_bytes
from nanovllm.bench.report import format_decode, format_nano
from nanovllm.bench.shapes import SIZES, published_config, shape_directory
from nanovllm.bench.workload import DecodeWorkload, fill_cache, run_turn, seat
from nanovllm.layers.attention import HeadShape
from nanovllm.layers.attention_torch import TorchBackend
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_config import Qwen3Config

# Parameters of the published checkpoints, a tied output head counted once.
PUBLISHED = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
}
# For shapes that a CPU runs in no time.
SMALL_COMMON = {**published_config("0.6B"), "vocab_size": 128, "num_key_value_heads": 1}
QUICK = ["--device", "cpu", "--batch", "3", "--context", "9", "--output", "8", "--seconds", "0.02"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], dict[str, Any]]:
    """One run of all modes, for several tests to look at: its table, and its JSON object."""
    path = tmp_path_factory.mktemp("bench") / "result.json"
    with redirect_stdout(io.StringIO()) as out:
        bench_pipeline.main([*QUICK, "--json", str(path)])
    *lines, last = out.getvalue().splitlines()
    assert json.loads(last) == json.loads(path.read_text(encoding="utf-8"))
    return lines, json.loads(last)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[list[str], dict[str, Any]]:
    """The lines that bench_pipeline.py prints before the last, and the last, parsed."""
    bench_pipeline.main(argv)
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def meta_model(shape: str, layers: int | None = None) -> Qwen3ForCausalLM:
    """A model of that shape without memory."""
    config = Qwen3Config.from_dict(published_config(shape, layers))
    heads = HeadShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    with torch.device("meta"):
        return Qwen3ForCausalLM(config, TorchBackend(heads), ParallelGroup()).bfloat16()


class TestDecodeSteps:
    def test_the_table_has_a_row_a_mode(self, output: tuple[list[str], dict[str, Any]]) -> None:
        lines, record = output
        rows = {line.split()[0]: line for line in lines[-5:]}
        assert list(rows) == list(MODES)
        for arm in record["arms"]:
            if not arm["fell_back"]:
                assert f"{arm['step_ms']['median']:.3f}" in rows[arm["mode"]]
        assert "of floor" not in "".join(lines)

    def test_the_record_says_what_was_measured(
        self, output: tuple[list[str], dict[str, Any]]
    ) -> None:
        record = output[1]
        assert (record["batch"], record["context"], record["output"]) == (3, 9, 8)
        assert record["mean_context"] == 13.5
        assert record["model"]["name"] == "tiny"
        assert record["device"]["type"] == "cpu"
        assert record["floor"] is None
        assert record["versions"]["torch"] == torch.__version__
        assert {"python", "triton", "cuda", "driver", "transformers"} <= record["versions"].keys()
        assert record["date"].startswith("20")
        assert 0 < record["startup_seconds"] < 60

    def test_times_rates_and_ratios_agree(self, output: tuple[list[str], dict[str, Any]]) -> None:
        arms = {arm["mode"]: arm for arm in output[1]["arms"]}
        reference = arms["sequential"]["step_ms"]["median"]
        for mode in ("sequential", "microbatch"):
            arm = arms[mode]
            times = arm["step_ms"]
            assert 0 < times["q1"] <= times["median"] <= times["q3"]
            assert arm["tokens_per_second"] == pytest.approx(3 / times["median"] * 1e3)
            assert arm["ratio"] == pytest.approx(reference / times["median"])
            assert arm["runs_as"] == mode
            assert arm["steps"] >= 12
        assert arms["sequential"]["steps_by_path"]["pipelined"] == 0
        assert arms["microbatch"]["steps_by_path"]["sequential"] == 0

    def test_modes_that_fall_back_are_not_timed(
        self, output: tuple[list[str], dict[str, Any]]
    ) -> None:
        lines, record = output
        for arm in record["arms"][2:]:
            assert arm["fell_back"]
            assert "needs a CUDA GPU" in arm["fallback_reason"]
            assert arm["step_ms"] is arm["ratio"] is arm["tokens_per_second"] is None
        assert sum("not timed, falls back: " in line for line in lines) == 3

    def test_a_shape_with_fewer_layers_and_chosen_modes(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(SIZES, "0.6B", (64, 128, 28, 2, True))
        monkeypatch.setattr("nanovllm.bench.shapes.COMMON", SMALL_COMMON)
        argv = [*QUICK, "--shape", "0.6B", "--layers", "2", "--modes", "microbatch"]
        lines, record = run(capsys, *argv)
        assert lines[0].startswith("Qwen3 0.6B: 2 layers")
        assert [arm["mode"] for arm in record["arms"]] == ["sequential", "microbatch"]
        assert record["options"]["load_format"] == "dummy"

    def test_one_sequence_cannot_be_cut(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, record = run(capsys, *QUICK, "--batch", "1", "--modes", "microbatch", "--sync")
        assert record["options"]["async_scheduling"] is False
        reason = record["arms"][1]["fallback_reason"]
        assert reason == "a batch of 1 is too small for 2 micro-batches"

    def test_columns_of_bandwidth(self) -> None:
        floor = {"step_ms": 1.0, "weight_bytes": 3e9, "kv_bytes": 1e9, "copy_bandwidth": 4e12}
        arm = {
            "mode": "green",
            "attention_sms": 36,
            "ffn_sms": 96,
            "fell_back": False,
            "step_ms": {"median": 1.25, "q1": 1.2, "q3": 1.3},
            "tokens_per_second": 1000.0,
            "ratio": 1.1,
            "bandwidth": 3.2e12,
            "floor_share": 0.8,
            "power": None,
        }
        model = {"name": "8B", "layers": 36, "parameters": 8_190_735_360, "dtype": "bfloat16"}
        record = {"model": model, "device": {"name": "GPU"}, "batch": 8, "context": 1, "output": 9}
        text = format_decode({**record, "floor": floor, "arms": [arm]})
        assert "floor 1.000 ms: 3.00 GB of weights and 1.00 GB of KV at 4.00 TB/s (copy)" in text
        row = " ".join(text.splitlines()[-1].split())
        assert row == "green 36+96 1.250 1.200 to 1.300 1,000 1.100 3.20 80%"
        arm["power"] = {"watts": 683.2, "sm_mhz": 1485.4, "samples": 9, "joules_per_step": 0.854}
        *_, head, row = format_decode({**record, "floor": floor, "arms": [arm]}).splitlines()
        assert head.split()[-3:] == ["W", "MHz", "J/step"]
        assert row.split()[-3:] == ["683", "1485", "0.85"]


class TestNano:
    def test_the_workload_is_the_one_of_nano_vllm(self) -> None:
        prompts, params = nano.draw_requests(256, 151936)
        assert sum(map(len, prompts)) == 142_827
        assert sum(param.max_tokens for param in params) == 133_966
        assert max(map(max, prompts)) <= 10_000

    @pytest.mark.parametrize("mode", ["sequential", "microbatch", "green"])
    def test_runs(
        self, mode: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(nano, "SHORTEST", 8)
        monkeypatch.setattr(nano, "LONGEST", 12)
        argv = ["--workload", "nano", "--device", "cpu", "--requests", "3", "--mode", mode]
        lines, record = run(capsys, *argv)
        assert record["benchmark"] == "nano"
        assert record["requests"] == 3
        assert 24 <= record["output_tokens"] <= 36
        rate = record["output_tokens"] / record["seconds"]
        assert record["output_tokens_per_second"] == pytest.approx(rate)
        assert record["fell_back"] == (mode == "green")
        assert record["steps_by_path"]["pipelined" if mode == "microbatch" else "sequential"] > 7
        assert f"{rate:,.0f} output tokens per second" in lines
        assert record["gpu_idle_share"] is None
        assert record["prefill_seconds"] > 0
        assert record["decode_seconds"] > 0
        assert record["prefill_seconds"] + record["decode_seconds"] < record["seconds"]
        assert any(line.startswith("prefill steps take ") for line in lines)

    def test_the_time_without_work_is_a_line(self) -> None:
        record = {
            "model": {"name": "0.6B", "layers": 28, "parameters": 6e8, "dtype": "bfloat16"},
            "device": {"name": "GPU"},
            "requests": 256, "prompt_tokens": 142_827, "output_tokens": 133_966, "seconds": 5.0,
            "output_tokens_per_second": 26_793.2, "runs_as": "sequential", "fell_back": False,
            "prefill_seconds": 0.8, "decode_seconds": 4.0,
            "gpu_idle_share": 0.0123, "gpu_idle_gaps": 1_020,
        }  # fmt: skip
        assert format_nano(record).splitlines()[-2:] == [
            "prefill steps take 0.80 s of it, decode steps 4.00 s",
            "between decode steps the GPU is idle for 1.23% of the time (1,020 gaps)",
        ]


class TestParts:
    @pytest.mark.parametrize("shape", SIZES)
    def test_shapes_have_the_published_size(self, shape: str) -> None:
        assert sum(weight.numel() for weight in meta_model(shape).parameters()) == PUBLISHED[shape]

    def test_a_shape_directory_is_a_model_without_weights(self) -> None:
        with shape_directory("14B", layers=3) as directory:
            assert Qwen3Config.from_directory(Path(directory)).num_hidden_layers == 3
        assert not Path(directory).exists()

    def test_the_floor_counts_what_a_step_reads(self) -> None:
        model = meta_model("8B")
        model.bind_kv_cache(torch.empty(36, 2, 5, 8, 256, 128, dtype=torch.bfloat16, device="meta"))
        floor = Floor.of(model, DecodeWorkload(batch=10, context=100, output=19), 1e12)
        embedding = 151_936 * 4096
        assert weight_bytes(model) == floor.weight_bytes == 2 * (PUBLISHED["8B"] - embedding)
        assert kv_bytes_per_token(model) == 36 * 2 * 8 * 128 * 2
        assert floor.kv_bytes == 10 * 110 * 147_456
        assert floor.seconds == pytest.approx((floor.weight_bytes + floor.kv_bytes) / 1e12)
        tied = meta_model("0.6B")
        assert weight_bytes(tied) == 2 * PUBLISHED["0.6B"]

    @pytest.mark.parametrize(
        ("sms", "attention", "ffn", "split"),
        [
            (132, None, None, (36, 96)),
            (132, 40, None, (40, 92)),
            (132, None, 104, (28, 104)),
            (132, 16, 16, (16, 16)),
            (108, None, None, (28, 80)),
            (0, None, None, None),
        ],
    )
    def test_the_default_split_fills_the_device(
        self, sms: int, attention: int | None, ffn: int | None, split: tuple[int, int] | None
    ) -> None:
        assert choose_split(sms, attention, ffn) == split

    def test_green_has_an_arm_a_split(self) -> None:
        splits = [(28, 104), (60, 72), (28, 104)]
        specs = arm_specs(["auto", "green", "auto"], splits, (36, 96))
        assert [(spec.label, spec.mode, spec.split) for spec in specs] == [
            ("sequential", "sequential", (36, 96)),
            ("auto", "auto", (36, 96)),
            ("green 28+104", "green", (28, 104)),
            ("green 60+72", "green", (60, 72)),
        ]
        assert arm_specs(["green"], [], (36, 96))[1].label == "green"

    @pytest.mark.parametrize("counts", [(132, None), (None, 140)])
    def test_a_split_leaves_some_for_both(self, counts: tuple[int | None, int | None]) -> None:
        with pytest.raises(BenchError, match="none of the device's 132 SMs"):
            choose_split(132, *counts)


class TestEngineSide:
    """What the benchmark does to an engine, and that it leaves it as it was."""

    def test_seated_sequences_are_ready_to_decode(self) -> None:
        workload = DecodeWorkload(batch=4, context=300, output=6)
        prompts = workload.draw_prompts(1024)
        with LLM(
            device="cpu", num_kvcache_blocks=workload.blocks(256), enable_prefix_caching=False
        ) as engine:
            workload.check_fits(engine)
            fill_cache(engine)
            seat(engine, workload, prompts)
            running = engine.scheduler.running
            blocks = [block for seq in running for block in seq.block_table]
            assert [seq.token_ids[:-1] for seq in running] == prompts
            assert [seq.prompt_len for seq in running] == [300] * 4
            assert len(set(blocks)) == len(blocks) == 8
            assert [seq.num_computed for seq in running] == [300] * 4
            cache = engine.model_runner.model.model.layers[-1].self_attn.k_cache
            assert cache.isfinite().all()
            assert cache[blocks].std() == pytest.approx(1, abs=0.05)
            while not engine.is_finished():
                engine.step()
            statistics = engine.model_runner.get_pipeline_statistics()
            assert statistics["steps"] == {"pipelined": 0, "sequential": 6}
            assert len(run_turn(engine, workload, prompts)) == 2
            assert engine.scheduler.num_preemptions == 0

    def test_arms_leave_the_engine_as_it_was(self) -> None:
        with LLM(device="cpu", num_kvcache_blocks=4) as engine:
            own = engine.model_runner.step_runner
            before = engine.generate(["Once upon"], max_tokens=5, temperature=0, use_tqdm=False)
            with open_arms(engine, [ArmSpec("sequential"), ArmSpec("microbatch")]) as arms:
                arms[1].activate()
                assert engine.model_runner.step_runner is not own
            assert engine.model_runner.step_runner is own
            after = engine.generate(["Once upon"], max_tokens=5, temperature=0, use_tqdm=False)
            assert before == after


class TestBadArguments:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--batch", "0"], "--batch: 0 is not above 0"),
            (["--batch", "many"], "--batch: invalid int value: 'many'"),
            (["--seconds", "nan"], "--seconds: nan is not above 0"),
            (["--shape", "7B"], "--shape: invalid choice: '7B'"),
            (["--modes", "fast"], "--modes: invalid choice: 'fast'"),
            (["--shape", "8B", "--model", "m"], "give either --shape or --model"),
            (["--layers", "2"], "--layers needs --shape"),
            (["--requests", "2"], "--requests is an option of --workload nano and --workload pre"),
            (["--workload", "nano", "--batch", "2"], "--batch is an option of --workload decode"),
            (["--workload", "nano", "--map"], "not allowed with argument --workload"),
            (["--output", "4"], "output=4 is not allowed: it must be at least 5"),
            (["--context", "4090"], "must be below the model's longest sequence, 4096 tokens"),
            (["--device", "tpu"], "device='tpu' is not allowed"),
            (["--json", "nowhere/at/all.json"], "there is no directory nowhere/at"),
        ],
    )
    def test_is_an_error_that_says_why(
        self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_info:
            bench_pipeline.main([*(["--device", "cpu"] if "--device" not in argv else []), *argv])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err

    def test_a_directory_without_a_model(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            bench_pipeline.main(["--device", "cpu", "--model", str(tmp_path)])
        assert "holds no config.json" in capsys.readouterr().err

    def test_more_sequences_than_there_is_memory_for(self) -> None:
        workload = DecodeWorkload(batch=4, context=300, output=6)
        with (
            LLM(device="cpu", num_kvcache_blocks=7) as engine,
            pytest.raises(ValueError, match="it needs 10 KV blocks of 256 tokens, and there is"),
        ):
            workload.check_fits(engine)


def test_a_timeline_of_the_last_mode_is_written(tmp_path):
    file = tmp_path / "steps.json"
    small = ["--batch", "2", "--context", "16", "--output", "6", "--seconds", "0.01"]
    bench_pipeline.main([*small, "--modes", "microbatch", "--timeline", str(file)])
    events = json.loads(file.read_text())["traceEvents"]
    assert {event["args"].get("micro_batch") for event in events if event["ph"] == "X"} == {0, 1}
