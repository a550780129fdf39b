"""`python -m nanovllm.bench` on the CPU with the embedded model: what it measures and prints."""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.bench import BenchError, ceilings, decode, growing, options, power
from nanovllm.bench.arms import arm_specs, choose_split, open_arms
from nanovllm.bench.engines import fill_cache
from nanovllm.bench.shapes import SIZES, published_config, shape_directory
from nanovllm.bench.turns import DecodeWorkload, Turn, run_turn
from nanovllm.engine.model_runner import ignore
from nanovllm.engine.parallel.processes import RankDiedError
from nanovllm.models import load_config, parse_config
from tests.bench_runs import GROW, pretend_planner, run
from tests.engine.cases import said

QUICK = ["--batch", "3", "--context", "9", "--output", "8", "--seconds", "0.02"]
# Parameters of the published checkpoints, a tied output head counted once; norms are few of them.
PUBLISHED = {
    "0.6B": 596_049_920,
    "1.7B": 1_720_574_976,
    "4B": 4_022_468_096,
    "8B": 8_190_735_360,
    "14B": 14_768_307_200,
    "32B": 32_762_123_264,
}


class TestDecode:
    def test_table_and_record(self, capsys, tmp_path):
        file = tmp_path / "result.json"
        lines, record = run(capsys, *QUICK, "--json", file, "--modes", *options.MODES)
        assert json.loads(file.read_text()) == record
        assert lines == decode.describe(record).splitlines()
        assert record["model"]["name"] == "tiny"
        assert record["floor"] is None
        arms = {arm["mode"]: arm for arm in record["arms"]}
        assert list(arms) == list(options.MODES)
        for mode in ("sequential", "microbatch"):
            arm = arms[mode]
            ms = arm["step_ms"]
            assert 0 < ms["q1"] <= ms["median"] <= ms["q3"]
            assert arm["tokens_per_second"] == pytest.approx(3 / ms["median"] * 1e3)
            reference = arms["sequential"]["step_ms"]["median"]
            assert arm["ratio"] == pytest.approx(reference / ms["median"])
            assert arm["fallback_reason"] is None
            assert any(line.split()[:2] == [mode, "all"] for line in lines)
        for mode in ("streams", "green", "auto"):
            assert "step_ms" not in arms[mode]
            assert "needs a CUDA GPU" in arms[mode]["fallback_reason"]
            assert any(line.startswith(f"{mode} is not timed, falls back") for line in lines)

    def test_a_small_shape(self, capsys, monkeypatch):
        monkeypatch.setitem(SIZES, "0.6B", (64, 128, 28, 2, True))
        small = {"vocab_size": 128, "num_key_value_heads": 1}
        for name, value in small.items():
            monkeypatch.setitem(sys.modules["nanovllm.bench.shapes"].COMMON, name, value)
        argv = [*QUICK, "--shape", "0.6B", "--layers", "2", "--modes", "microbatch", "--sync"]
        lines, record = run(capsys, *argv)
        assert lines[0].startswith("Qwen3-0.6B: 2 layers")
        assert [arm["mode"] for arm in record["arms"]] == ["sequential", "microbatch"]
        assert record["options"]["load_format"] == "dummy"
        assert record["options"]["async_scheduling"] is False

    def test_several_ranks(self, capsys):
        """They have one mode beside sequential."""
        argv = [*QUICK, "--tensor-parallel-size", "2", "--modes", "microbatch", "green"]
        lines, record = run(capsys, *argv)
        assert record["ranks"] == 2
        assert "2 x " in lines[0]
        assert [arm["mode"] for arm in record["arms"]] == ["sequential", "microbatch"]
        assert all(arm["step_ms"]["median"] > 0 for arm in record["arms"])

    def test_a_rank_that_dies_is_one_line(self, capsys, monkeypatch):
        def die(*_, **__):
            raise RankDiedError("rank 1 of 2 was killed by SIGKILL")

        monkeypatch.setattr("nanovllm.bench.engines.LLMEngine", die)
        with pytest.raises(SystemExit) as error:
            run(capsys, *QUICK)
        assert error.value.code == 2
        assert capsys.readouterr().err.endswith("rank 1 of 2 was killed by SIGKILL\n")

    def test_a_batch_too_small(self, capsys):
        _, record = run(capsys, *QUICK, "--batch", "1", "--modes", "microbatch")
        assert "batch of 1" in record["arms"][1]["fallback_reason"]

    def test_a_timeline_of_the_last_mode(self, capsys, tmp_path):
        file = tmp_path / "steps.json"
        run(capsys, *QUICK, "--modes", "microbatch", "--timeline", file)
        events = json.loads(file.read_text())["traceEvents"]
        assert {e["args"].get("micro_batch") for e in events if e["ph"] == "X"} == {0, 1}

    def test_columns_of_floor_and_power(self):
        arm = {
            "mode": "green", "label": "green", "lane_sms": {"attention": 36, "ffn": 96},
            "fallback_reason": None, "tokens_per_second": 1000.0, "ratio": 1.1,
            "step_ms": {"median": 1.25, "q1": 1.2, "q3": 1.3}, "terabytes_per_second": 3.2,
            "floor_share": 0.8, "watts": 683.2, "sm_mhz": 1485.4, "joules_per_step": 0.854,
        }  # fmt: skip
        record = {
            "model": {"name": "Qwen3-8B", "layers": 36, "parameters": 8e9, "dtype": "bfloat16"},
            "device": {"name": "GPU"}, "batch": 8, "context": 1, "output": 9, "arms": [arm],
            "floor": {"step_ms": 1.0, "weight_bytes": 3e9, "kv_bytes": 1e9, "copy_bandwidth": 4e12},
        }  # fmt: skip
        *_, head, row = decode.describe(record).splitlines()
        cells = "green 36+96 1.250 1.200 to 1.300 1,000 1.100 3.20 80% 683 1485 0.85"
        assert row.split() == cells.split()
        assert head.split()[-5:] == ["of", "floor", "W", "MHz", "J/step"]


class TestGrowing:
    def test_table_and_record(self, capsys, monkeypatch):
        pretend_planner(monkeypatch)
        lines, record = run(capsys, *GROW, "--modes", "microbatch", "auto")
        assert lines == growing.describe(record).splitlines()
        assert record["turn_steps"] == 2
        assert sum(stage["steps"] for stage in record["stages"]) == 50
        labels = [arm["label"] for arm in record["arms"]]
        assert labels == ["sequential", "microbatch", "auto"]
        ways = dict.fromkeys(labels, 0.0)
        for stage in record["stages"]:
            assert stage["plan"] == "green 36+96"
            assert stage["arms"].keys() == {*labels}
            for label, arm in stage["arms"].items():
                assert arm["step_ms"]["median"] > 0
                ways[label] += stage["steps"] * arm["step_ms"]["median"] * 1e-3
        seconds = next(line for line in lines if line.startswith("s  "))
        assert seconds.split()[1:] == [f"{way:.2f}" for way in ways.values()]
        assert any(line.endswith("auto's plan") for line in lines)
        assert lines[-1].startswith("auto is ")

    def test_the_largest_run_fits_a_gpu_by_default(self, monkeypatch):
        asked = []

        def start_arms(args: Any, *rest: Any) -> None:
            asked.append(args.layers)
            raise BenchError

        monkeypatch.setattr(growing, "start_arms", start_arms)
        for argv in (["--shape", "0.6B"], ["--shape", "0.6B", "--layers", "28"], ["--model", "m"]):
            args = options.parse(None, ["--workload", "growing", "--device", "cpu", *argv])
            with pytest.raises(BenchError):
                next(growing.run(args))
        assert asked == [14, 28, None]

    @pytest.mark.parametrize("seed", range(10))
    def test_ranges_hold_every_step_once_and_turns_lie_in_their_middle(self, seed):
        rng = random.Random(seed)
        context = rng.randint(50, 300)
        until = context * rng.randint(2, 40)
        ranges = growing.context_ranges(
            8, context, until, rng.randint(1, 12), output := rng.randint(5, 30)
        )
        begin = context
        for steps, workload in ranges:
            # A step reads at least one token more than there were.
            middle = begin + (steps + 1) / 2
            assert workload.mean_context == pytest.approx(middle, abs=0.6)
            assert workload.output == output
            begin += steps
        assert begin == until

    def test_ranges_have_equal_ratios(self):
        contexts = [w.mean_context for _, w in growing.context_ranges(512, 128, 4096, 16, 24)]
        ratios = [b / a for a, b in pairwise(contexts)]
        assert ratios == pytest.approx([32 ** (1 / 16)] * 15, rel=0.01)


class TestCeilings:
    @pytest.mark.parametrize("seed", range(3))
    def test_flops_equal_a_count_product_by_product(self, seed):
        rng = random.Random(seed)
        kv_heads = rng.randint(1, 3)
        config = parse_config(
            published_config("0.6B") | {
                "vocab_size": rng.randint(20, 50), "hidden_size": rng.randint(3, 9),
                "intermediate_size": rng.randint(3, 9), "num_hidden_layers": rng.randint(1, 3),
                "num_attention_heads": kv_heads * rng.randint(1, 3),
                "num_key_value_heads": kv_heads, "head_dim": 2 * rng.randint(1, 4),
            }
        )  # fmt: skip
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 4))]
        hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
        heads = config.num_attention_heads
        flops = 0
        for length in lengths:
            layer = 2 * length * hidden * dim * (2 * heads + 2 * config.num_key_value_heads)
            layer += 3 * 2 * length * hidden * inner
            layer += sum(2 * 2 * heads * dim * (position + 1) for position in range(length))
            flops += config.num_hidden_layers * layer + 2 * hidden * config.vocab_size
        assert ceilings.prefill_flops(config, lengths) == flops


class TestArms:
    @pytest.mark.parametrize(
        ("device_sms", "attention", "ffn", "split"),
        [
            (132, None, None, (36, 96)),
            (132, 40, None, (40, 92)),
            (132, None, 104, (28, 104)),
            (132, 16, 16, (16, 16)),
            (0, None, None, None),
        ],
    )
    def test_the_default_split_fills_the_device(self, device_sms, attention, ffn, split):
        assert choose_split(device_sms, attention, ffn) == split

    def test_a_split_leaves_some_for_both(self):
        for counts in ((132, None), (None, 140)):
            with pytest.raises(ValueError, match="132 SMs"):
                choose_split(132, *counts)

    def test_green_has_an_arm_a_split(self, monkeypatch):
        monkeypatch.setattr("nanovllm.bench.arms.sm_count", lambda device: 132)
        argv = ["--device", "cpu", "--modes", "auto", "green", "auto"]
        splits = ["--splits", "28+104", "60+72", "28+104"]
        specs = arm_specs(options.parse(None, ["--map", *argv, *splits]))
        assert specs == {
            "sequential": ("sequential", (36, 96)),
            "auto": ("auto", (36, 96)),
            "green 28+104": ("green", (28, 104)),
            "green 60+72": ("green", (60, 72)),
        }
        assert next(iter(specs)) == "sequential"
        assert len(arm_specs(options.parse(None, ["--map", *argv]))) == 2 + 5
        assert arm_specs(options.parse(None, argv))["green"] == ("green", (36, 96))

    def test_leave_the_engine_as_it_was(self):
        with LLM(device="cpu", num_kvcache_blocks=4) as engine:
            runner = engine.model_runner
            own = runner.step_runner, runner.step_runner.chooser
            before = engine.generate(["Once upon"], max_tokens=5, temperature=0, use_tqdm=False)
            with open_arms(
                engine, {mode: (mode, None) for mode in ("sequential", "microbatch")}
            ) as arms:
                arms[1].activate()
                assert runner.step_runner is arms[1].step_runner is not own[0]
            assert (runner.step_runner, runner.step_runner.chooser) == own
            assert runner.watch is ignore
            after = engine.generate(["Once upon"], max_tokens=5, temperature=0, use_tqdm=False)
            assert said(before) == said(after)


class TestTurns:
    def test_sequences_decode_from_their_context_on(self):
        workload = DecodeWorkload(batch=4, context=300, output=6)
        seen: list[tuple[bool, int, int, int]] = []

        def watch(moment: str, step: Any) -> None:
            if moment == "begin":
                used = workload.blocks(256) - len(engine.scheduler.blocks.free)
                seen.append((step.is_decode, len(step.chunks), step.chunks[0].end, used))

        with LLM(
            device="cpu", num_kvcache_blocks=workload.blocks(256), enable_prefix_caching=False
        ) as engine:
            workload.check_fits(engine)
            fill_cache(engine)
            assert engine.model_runner.model.kv_cache.std() == pytest.approx(1, abs=0.05)
            engine.model_runner.watch = watch
            assert len(run_turn(engine, workload)) == 2
            assert seen == [(True, 4, 301 + i, 8) for i in range(6)]
            assert len(run_turn(engine, workload)) == 2
            assert engine.scheduler.num_preemptions == 0
            assert len(engine.scheduler.blocks.free) == engine.model_runner.num_blocks

    def test_more_sequences_than_there_is_memory_for(self):
        workload = DecodeWorkload(batch=4, context=300, output=6)
        with LLM(device="cpu", num_kvcache_blocks=7, enable_prefix_caching=False) as engine:
            with pytest.raises(ValueError, match=r"need 10 KV blocks .* for 7"):
                workload.check_fits(engine)
            with pytest.raises(ValueError, match="no room"):
                run_turn(engine, workload)


class TestShapes:
    @pytest.mark.parametrize("shape", SIZES)
    def test_have_the_published_size(self, shape):
        config = parse_config(published_config(shape))
        assert config.num_weights == pytest.approx(PUBLISHED[shape], rel=1e-3)

    def test_directories_are_models_without_weights(self):
        with shape_directory("14B", layers=3) as directory:
            assert load_config(Path(directory)).num_hidden_layers == 3
        assert not Path(directory).exists()

    @pytest.mark.parametrize("tied", [True, False])
    def test_the_floor_counts_what_a_step_reads(self, tied):
        model, config = torch.nn.Module(), parse_config(published_config("8B"))
        object.__setattr__(config, "tie_word_embeddings", tied)
        embedding = 151_936 * 4096
        model.weights = torch.nn.Parameter(
            torch.empty(3 * embedding, dtype=torch.bfloat16, device="meta")
        )
        model.kv_cache = torch.empty(36, 2, 5, 8, 256, 128, dtype=torch.bfloat16, device="meta")
        runner: Any = type("", (), {"model": model, "model_config": config})
        runner.config = type("", (), {"tensor_parallel_size": 1})
        floor = ceilings.decode_floor(runner, DecodeWorkload(10, 100, 19), 1e12)
        assert floor["weight_bytes"] == (6 if tied else 4) * embedding
        assert floor["kv_bytes"] == 10 * 110 * 36 * 2 * 8 * 128 * 2
        assert floor["step_ms"] == pytest.approx(
            (floor["weight_bytes"] + floor["kv_bytes"]) / 1e12 * 1e3
        )


class TestPower:
    def test_samples_count_for_the_arm_whose_steps_ran(self, monkeypatch, tmp_path):
        samples = {t / 2: f"{t / 2}, {100.0 * t}, 1500" for t in range(14)}
        file = tmp_path / "samples"
        file.write_text("\n".join(["no sample", *samples.values()]))
        monkeypatch.setattr(power, "PATIENCE_SECONDS", 0)
        monkeypatch.setattr(power, "parse", lambda line: eval(line) if "," in line else None)
        turns = [
            Turn(SimpleNamespace(label=label), [end - begin], end)  # type: ignore[arg-type]
            for label, begin, end in (("a", 1, 2), ("b", 3, 4), ("c", 2.1, 2.2), ("a", 5, 6))
        ]
        readings = power.read_samples(file, turns)
        watts = [100.0 * t for t in (2, 3, 4, 10, 11, 12)]
        assert readings["a"] == {"watts": sum(watts) / 6, "sm_mhz": 1500.0, "samples": 6}
        assert readings["b"]["samples"] == 3
        assert "c" not in readings

    def test_a_line_is_a_sample(self):
        line = "2026/11/25 16:01:02.345, 683.21, 1485\n"
        moment, watts, mhz = power.parse(line) or (0, 0, 0)
        assert (moment % 60, watts, mhz) == (pytest.approx(2.345), 683.21, 1485.0)
        for other in ("", "No devices were found", line.replace("1485", "[N/A]"), line + ", 3"):
            assert power.parse(other) is None
