"""Whole runs of requests: the requests, the log of their steps, and runs on the CPU."""

import json
import random
import zlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM
from nanovllm.bench import __main__ as bench
from nanovllm.bench import requests, throughput
from nanovllm.bench.requests import draw_requests, within
from nanovllm.bench.step_log import LoggedStep, StepLog, count_tokens
from tests.bench_runs import refusal, run
from tests.checkpoints import Shape


class TestRequests:
    @pytest.mark.parametrize(
        ("name", "count", "tokens_in", "tokens_out", "checksum"),
        [
            ("W", 256, 142_827, 133_966, 2867243125),
            ("chat", 1500, 321_297, 284_433, 1777398783),
            ("short", 1024, 131_072, 524_288, 1341347941),
        ],
    )
    def test_are_those_that_other_engines_were_given(
        self, name, count, tokens_in, tokens_out, checksum
    ):
        """The checksum is that of the same draw by the script that drives the other engines."""
        prompts, outputs = draw_requests(name)
        assert (len(prompts), sum(map(len, prompts)), sum(outputs)) == (
            count, tokens_in, tokens_out,
        )  # fmt: skip
        assert zlib.crc32(json.dumps([prompts, outputs]).encode()) == checksum

    def test_sets_of_equal_requests(self, monkeypatch):
        assert requests.EQUAL["steady"] == (2000, 1500, 500)
        assert requests.MAX_NUM_SEQS["steady"] == 256
        for name in requests.EQUAL:
            monkeypatch.setitem(requests.EQUAL, name, (3, 5, 7))
            prompts, outputs = draw_requests(name)
            assert ([len(prompt) for prompt in prompts], outputs) == ([5] * 3, [7] * 3)

    def test_fit_any_vocabulary_and_may_be_fewer(self):
        prompts, outputs = draw_requests("W", first=3)
        assert (len(prompts), len(outputs)) == (3, 3)
        small = within(prompts, 50)
        assert [*map(len, small)] == [*map(len, prompts)]
        assert max(map(max, small)) < 50
        assert within(prompts, 151_936) == prompts


def step(
    is_decode: bool, drawn: list[int], chunks: list[tuple[int, int, int]], at: float = 0.0
) -> LoggedStep:
    return LoggedStep(is_decode, drawn=drawn, chunks=chunks, tokens_at=at)


class TestTotals:
    @pytest.mark.parametrize("seed", range(5))
    def test_time_between_tokens_is_that_of_each_request(self, seed):
        rng = random.Random(seed)
        steps, moments, now = [], defaultdict(list), 0.0
        for _ in range(rng.randint(3, 40)):
            now += rng.uniform(0.001, 0.2)
            drawn = rng.sample(range(6), rng.randint(1, 6))
            steps.append(step(rng.random() < 0.8, drawn, [], now))
            for request in drawn:
                moments[request].append(now)
        gaps = np.concatenate([np.diff(of) for of in moments.values()]) * 1e3
        found = count_tokens(steps)["inter_token_ms"]
        assert found["median"] == pytest.approx(np.percentile(gaps, 50))
        assert found["p99"] == pytest.approx(np.percentile(gaps, 99))

    def test_one_token_each_has_no_time_between(self):
        assert count_tokens([step(True, [0, 1], [])])["inter_token_ms"] is None

    def test_recomputed_tokens(self):
        steps = [
            step(False, [0], [(0, 0, 10), (1, 0, 4)]),  # the second prompt in parts
            step(False, [1], [(1, 4, 8)]),
            step(True, [0, 1], []),  # both have 11 and 9 tokens computed
            step(False, [1], [(1, 0, 10)]),  # preempted: 9 of 10 again
            step(False, [0], [(0, 8, 12)]),  # preempted, found 8 in the prefix cache: 3 again
            step(True, [0, 1], []),
        ]
        assert count_tokens(steps)["recomputed_tokens"] == 9 + 3

    @pytest.mark.parametrize("blocks", [40, 3])
    def test_of_a_run(self, blocks, monkeypatch):
        """With few blocks, requests are preempted and computed again."""
        monkeypatch.setattr(throughput, "WARM_UP", [1])
        with LLM(
            device="cpu", num_kvcache_blocks=blocks, kvcache_block_size=16, max_num_seqs=4,
            enable_prefix_caching=False, max_model_len=48,
        ) as engine:  # fmt: skip
            requests = [[5] * 14, [6] * 15], [8, 9]
            record = throughput.run_requests(engine, requests)
        assert (record["prompt_tokens"], record["output_tokens"]) == (29, 17)
        assert record["output_tokens_per_second"] == pytest.approx(17 / record["seconds"])
        again = record["recomputed_tokens"]
        assert (again > 0) == (record["preemptions"] > 0) == (blocks == 3)
        # A preempted request's next token is drawn by prefill.
        drawn_by_prefill = 2 + record["preemptions"]
        assert record["decode_tokens"] == 17 - drawn_by_prefill
        assert record["prefill_tokens"] == 29 + again + record["preemptions"]
        assert 0 < record["inter_token_ms"]["median"] <= record["inter_token_ms"]["p99"]
        assert record["prefill_seconds"] + record["decode_seconds"] < record["seconds"]


class Device:
    """A clock of the host, and a stream: work and events in order, never before their issue."""

    def __init__(self) -> None:
        self.now = self.free = self.idle = 0.0

    def work(self, seconds: float) -> None:
        self.idle += max(self.now - self.free, 0.0)
        self.free = max(self.now, self.free) + seconds

    def event(self) -> Any:
        event = SimpleNamespace(moment=float("inf"))
        event.record = lambda: setattr(event, "moment", max(self.now, self.free))
        event.query = lambda: event.moment <= self.now
        event.elapsed_time = lambda end: (end.moment - event.moment) * 1e3
        return event


@pytest.mark.parametrize("seed", range(5))
def test_idle_time_of_a_device_that_runs_dry(seed, monkeypatch):
    """Never less than it is, and exact where the device waits for all of the launch."""
    rng, device = random.Random(seed), Device()
    runner: Any = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), graph_memory=object(), synchronize=lambda: None
    )
    monkeypatch.setattr("torch.cuda.Event", lambda **options: device.event())
    monkeypatch.setattr("nanovllm.bench.step_log.time.perf_counter", lambda: device.now)
    decode: Any = SimpleNamespace(is_decode=True, chunks=[])
    log = StepLog(runner)
    most = 0.0
    with log:
        for number in range(40):
            device.now += rng.uniform(0, 0.02)
            runner.watch("begin", decode)
            before, launch = device.idle, rng.uniform(0, 0.004)
            device.now += launch
            device.work(rng.uniform(0, 0.02))
            if number == 0:
                device.idle = 0.0
            elif 0 < device.idle - before < launch:
                most += launch
            runner.watch("issued", decode)
            runner.watch("end", decode)
    device.now = device.free
    totals = log.totals()
    work = totals["decode_seconds"] - log.steps[-1].seconds
    idle = totals["gpu_idle_share"] * work / (1 - totals["gpu_idle_share"])
    assert device.idle - 1e-9 <= idle <= device.idle + most + 1e-9


class TestOnTheCpu:
    @pytest.fixture(autouse=True)
    def _short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(requests, "draw_w", lambda: ([[7] * 9, [8] * 8, [9] * 7], [10, 11, 12]))
        monkeypatch.setitem(requests.EQUAL, "steady", (3, 5, 8))

    @pytest.mark.parametrize("mode", ["sequential", "microbatch", "green"])
    def test_nano(self, mode, capsys):
        lines, record = run(capsys, "--workload", "nano", "--num-requests", "3", "--mode", mode)
        assert (record["requests"], record["output_tokens"]) == (3, 33)
        assert (record["fallback_reason"] is not None) == (mode == "green")
        assert any("fell back" in line for line in lines) == (mode == "green")
        assert (record["steps_by_path"]["pipelined"] > 7) == (mode == "microbatch")
        assert record["gpu_idle_share"] is None
        assert record["options"]["max_num_seqs"] == 512
        assert f"{record['output_tokens_per_second']:,.0f} output tokens per second" in lines

    def test_a_set_of_requests(self, capsys):
        argv = ["--workload", "throughput", "--requests", "steady", "--num-requests", "2"]
        lines, record = run(capsys, *argv)
        assert record["request_set"] == "steady"
        assert (record["prompt_tokens"], record["output_tokens"]) == (10, 16)
        assert record["options"]["max_num_seqs"] == 256
        assert (record["prefill_tokens"], record["decode_tokens"]) == (10, 14)
        assert any("99th percentile" in line for line in lines)
        _, record = run(capsys, *argv, "--max-num-seqs", "1")
        assert record["options"]["max_num_seqs"] == 1

    @pytest.mark.parametrize(("longest", "ids"), [(163, 8), (200, 193)])
    def test_requests_or_a_warm_up_too_long_for_the_model(
        self, longest, ids, monkeypatch, capsys, tmp_path
    ):
        """Found before it is loaded."""
        Shape().write(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["max_position_embeddings"] = longest
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setitem(requests.EQUAL, "steady", (3, ids, 8))
        monkeypatch.setattr("nanovllm.bench.engines.LLMEngine", None)
        argv = ["--workload", "throughput", "--requests", "steady", "--model", str(tmp_path)]
        capsys.readouterr()  # of the writing
        err = refusal(capsys, bench.main, *argv)
        assert f"{longest + 1} tokens are too many: the model's longest has {longest}" in err

    def test_prompts_alone(self, capsys, monkeypatch):
        monkeypatch.setitem(requests.EQUAL, "prefill", (3, 20, 1))
        lines, record = run(capsys, "--workload", "prefill", "--num-requests", "3")
        assert (record["prefill_tokens"], record["decode_tokens"]) == (60, 0)
        rates = record | {"matmul_peak": 8e14, "flops_per_second": 6e14}
        assert lines == throughput.describe(record).splitlines()
        assert "600 TFLOP/s, 75.0% of a large matrix product" in throughput.describe(rates)
