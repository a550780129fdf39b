"""Prefill alone: its flops against a count product by product, and runs with the embedded model.

Run with `pytest tests/test_bench_prefill.py`; it takes some seconds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import bench_pipeline
from nanovllm import LLM
from nanovllm.bench import BenchError, prefill
from nanovllm.bench.prefill import (
    PrefillResult,
    format_prefill,
    matmul_rate,
    measure_matmul_peak,
    prefill_flops,
    prefill_record,
    run_prefill,
)
from nanovllm.bench.shapes import published_config
from nanovllm.models.qwen3_config import Qwen3Config


def random_config(rng: random.Random) -> Qwen3Config:
    kv_heads = rng.randint(1, 3)
    fields = {
        "vocab_size": rng.randint(20, 50),
        "hidden_size": rng.randint(3, 9),
        "intermediate_size": rng.randint(3, 9),
        "num_hidden_layers": rng.randint(1, 3),
        "num_attention_heads": kv_heads * rng.randint(1, 3),
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * rng.randint(1, 4),
    }
    return Qwen3Config.from_dict(published_config("0.6B") | fields)


def product(rows: int, inner: int, columns: int) -> int:
    """Flops of [rows, inner] x [inner, columns], one by one."""
    return sum(2 for _ in range(rows) for _ in range(inner) for _ in range(columns))


def counted_flops(config: Qwen3Config, lengths: list[int]) -> int:
    """The model's products in the order in which it makes them."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    flops = 0
    for length in lengths:
        for _ in range(config.num_hidden_layers):
            flops += product(length, hidden, heads * dim)  # q_proj
            flops += 2 * product(length, hidden, kv_heads * dim)  # k_proj, v_proj
            for _ in range(heads):
                for position in range(length):
                    flops += product(1, dim, position + 1)  # scores
                    flops += product(1, position + 1, dim)  # values
            flops += product(length, heads * dim, hidden)  # o_proj
            flops += 2 * product(length, hidden, inner)  # gate_proj, up_proj
            flops += product(length, inner, hidden)  # down_proj
        flops += product(1, hidden, config.vocab_size)  # lm_head
    return flops


@pytest.mark.parametrize("seed", range(4))
def test_flops_equal_a_count_product_by_product(seed: int) -> None:
    rng = random.Random(seed)
    config = random_config(rng)
    lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 4))]
    assert prefill_flops(config, lengths) == counted_flops(config, lengths)


def test_flops_at_a_published_shape() -> None:
    """Two a weight and token make most of it."""
    config = Qwen3Config.from_dict(published_config("8B"))
    tokens = 8 * 2048
    in_layers = 8_190_735_360 - 2 * 151936 * 4096  # with the norms, which hardly count
    flops = prefill_flops(config, [2048] * 8)
    attention = 36 * 4 * 32 * 128 * 8 * 2048 * 2049 // 2
    assert flops - attention == pytest.approx(2 * in_layers * tokens, rel=1e-3)


@pytest.fixture(scope="module")
def engine() -> Iterator[LLM]:
    with LLM(
        device="cpu",
        enable_prefix_caching=False,
        max_num_seqs=4,
        max_num_batched_tokens=120,
        max_model_len=128,
        num_kvcache_blocks=8,
    ) as llm:
        yield llm


def test_prefill_takes_one_step_and_no_decode(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[int]] = []
    schedule = engine.scheduler.schedule

    def spy(**options: Any) -> Any:
        step = schedule(**options)
        if step is not None:
            assert not step.is_decode
            steps.append([chunk.end - chunk.start for chunk in step.chunks])
        return step

    monkeypatch.setattr(engine.scheduler, "schedule", spy)
    result = run_prefill(engine, 3, 40, repeats=4)
    assert steps == [[40] * 3] * 6  # with two to warm up
    assert engine.is_finished()
    assert len(result.seconds) == 4
    assert min(result.seconds) > 0
    assert result.flops == prefill_flops(engine.model_runner.model_config, [40] * 3)


def test_prompts_are_random_every_time(engine: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[int]] = []
    add_request = engine.add_request
    monkeypatch.setattr(
        engine, "add_request", lambda p, s: (prompts.append(p), add_request(p, s))[1]
    )
    run_prefill(engine, 2, 30, repeats=1)
    assert len(prompts) == 6
    assert len({tuple(prompt) for prompt in prompts}) == 6
    assert all(len(set(prompt)) > 10 for prompt in prompts)


@pytest.mark.parametrize(("requests", "tokens"), [(5, 10), (4, 31)], ids=["seats", "tokens"])
def test_what_does_not_fit_into_a_step_is_refused(engine: LLM, requests: int, tokens: int) -> None:
    allowed = r"max_num_seqs=4 prompts and max_num_batched_tokens=120 tokens"
    with pytest.raises(BenchError, match=rf"^{requests} prompts of {tokens} tokens .* {allowed}"):
        run_prefill(engine, requests, tokens)
    assert engine.is_finished()
    assert len(run_prefill(engine, 1, 5, repeats=2).seconds) == 2


def test_what_does_not_fit_into_the_model_is_refused(engine: LLM) -> None:
    with pytest.raises(BenchError, match="max_model_len allows 128"):
        run_prefill(engine, 1, 129)


def test_prefix_caching_is_refused() -> None:
    with (
        LLM(device="cpu", num_kvcache_blocks=4) as engine,
        pytest.raises(BenchError, match=r"^enable_prefix_caching=True is not allowed"),
    ):
        run_prefill(engine, 1, 5)


def test_the_peak_is_the_rate_of_the_fastest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {size: random.uniform(1, 2) for size in prefill.PEAK_SIZES["cpu"]}
    monkeypatch.setattr(prefill, "matmul_rate", lambda size, device, dtype: rates[size])
    assert measure_matmul_peak(torch.device("cpu"), torch.float32) == max(rates.values())


def test_a_rate_is_flops_over_the_time_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []

    def steady(call: Any, device: torch.device, seconds: float) -> float:
        assert call().shape == (96, 96)
        assert call().count_nonzero() == 96 * 96
        times.append(random.uniform(0.001, 0.1))
        return times[-1]

    monkeypatch.setattr(prefill, "steady_seconds", steady)
    rate = matmul_rate(96, torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(2 * 96**3 / times[0])


def test_the_peak_of_this_machine_is_a_number_that_can_be() -> None:
    assert 1e8 < measure_matmul_peak(torch.device("cpu"), torch.float32) < 1e15


def test_record_and_text_follow_from_the_result() -> None:
    seconds = [random.uniform(0.5, 0.7) for _ in range(5)]
    result = PrefillResult(8, 2048, seconds, int(2.5e14))
    record = prefill_record(result, 782e12)
    middle = sorted(seconds)[2]
    assert record["seconds"] == {"median": middle, "min": min(seconds), "max": max(seconds)}
    assert record["tokens_per_second"] == pytest.approx(8 * 2048 / middle)
    assert record["flops_per_second"] == pytest.approx(2.5e14 / middle)
    assert record["peak_share"] == pytest.approx(2.5e14 / middle / 782e12)
    model = {"name": "8B", "layers": 36, "parameters": 8.19e9, "dtype": "bfloat16"}
    text = format_prefill(record | {"model": model, "device": {"name": "NVIDIA Something"}})
    title, times, tokens, flops = text.splitlines()
    assert title.startswith("Qwen3 8B: 36 layers")
    assert times.startswith(f"8 prompts of 2,048 tokens in one step: {middle * 1e3:.1f} ms, median")
    assert tokens == f"{8 * 2048 / middle:,.0f} tokens per second"
    assert f"{100 * record['peak_share']:.1f}% of a large matrix product (782 TFLOP/s)" in flops


class TestCommandLine:
    ARGV = ("--workload", "prefill", "--device", "cpu", "--requests", "3", "--tokens", "20")

    def test_prints_the_result_and_its_record(self, capsys: pytest.CaptureFixture[str]) -> None:
        bench_pipeline.main(self.ARGV)
        *lines, last = capsys.readouterr().out.splitlines()
        record = json.loads(last)
        assert lines == format_prefill(record).splitlines()
        assert record["benchmark"] == "prefill"
        assert record["model"]["name"] == "tiny"
        assert (record["requests"], record["tokens"]) == (3, 20)
        assert record["options"]["max_num_batched_tokens"] == 60
        assert record["options"]["enable_prefix_caching"] is False

    def test_refuses_what_is_for_decode(self, capsys: pytest.CaptureFixture[str]) -> None:
        for option in ("--sync", "--enforce-eager"):
            with pytest.raises(SystemExit):
                bench_pipeline.main([*self.ARGV, option])
            assert f"{option} is an option of --workload decode" in capsys.readouterr().err

    def test_refuses_prompts_that_the_model_cannot_read(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            bench_pipeline.main([*self.ARGV, "--tokens", "5000"])
        assert "prompt has 5000 tokens, but max_model_len allows 4096" in capsys.readouterr().err
