"""`--curves` without a GPU: its splits, its work, its tables and its picture."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread

import bench_pipeline
from green_ctx import Granularity
from nanovllm.bench import BenchError, curves, curves_work
from nanovllm.bench.ceilings import layer_matrices
from nanovllm.bench.curves import MIN_DENSE_SMS, MOST_SPLITS, choose_splits, describe
from nanovllm.bench.report import write_record
from nanovllm.bench.shapes import published_config
from nanovllm.kernels import reference
from nanovllm.models import parse_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = parse_config(
    published_config("0.6B")
    | {"hidden_size": 48, "intermediate_size": 80, "head_dim": 32}
    | {"num_attention_heads": 4, "num_key_value_heads": 2}
)


def make_record(splits: int = 5) -> dict[str, Any]:
    """Random rates that grow with the SMs."""

    def rates(names: list[str], scale: float) -> list[dict[str, Any]]:
        sms = [*sorted(random.sample(range(12, 120), splits)), 132]
        return [
            {"sms": n} | {name: scale * n * random.uniform(0.8, 1.2) for name in names} for n in sms
        ]

    return {
        "benchmark": "curves",
        "date": "2026-11-23T10:00:00+00:00",
        "device": {"type": "cuda", "name": "NVIDIA Something", "sms": 132, "memory_gib": 139.8},
        "versions": {"torch": "2.11.0", "triton": None, "driver": "580.1"},
        "shape": "8B",
        "sequences": 256,
        "context": 1024,
        "bandwidth": rates(["attention", "read"], 33e9),
        "gemm": rates(["256", "512", "1024"], 5.5e12),
        "copy_bandwidth": 4.26e12,
        "matmul_peak": 782e12,
        "curves_seconds": 40.0,
    }


class TestSplits:
    def test_of_an_h200(self) -> None:
        splits = choose_splits(132, Granularity(minimum=8, alignment=8))
        assert len(splits) == MOST_SPLITS
        assert (splits[0], splits[-1]) == ((116, 16), (12, 120))

    @pytest.mark.parametrize("seed", range(5))
    def test_fill_the_device_with_an_aligned_dense_side(self, seed: int) -> None:
        rng = random.Random(seed)
        alignment = rng.choice([2, 4, 8])
        granularity = Granularity(alignment * rng.randint(1, 2), alignment)
        total = rng.randint(40, 200)
        splits = choose_splits(total, granularity)
        assert len(set(splits)) == len(splits) <= MOST_SPLITS
        for attention, dense in splits:
            assert attention + dense == total
            assert attention >= granularity.minimum
            assert dense >= MIN_DENSE_SMS
            assert granularity.round_up(dense) == dense

    def test_need_enough_sms(self) -> None:
        with pytest.raises(BenchError, match="20 SMs: 16"):
            choose_splits(20, Granularity(minimum=8, alignment=8))


class TestWork:
    @pytest.mark.parametrize("num_sms", [1, 7])
    def test_attention_and_its_bytes(self, num_sms: int) -> None:
        torch.manual_seed(0)
        work = curves_work.attention_work(SMALL, 3, 300, DEVICE, torch.float32)
        found = work.prepare(num_sms)()
        assert work.amount == 3 * 300 * 2 * (2 * 32) * 4
        # The same random numbers, in the plain form.
        torch.manual_seed(0)
        keys, values = (torch.randn(6, 2, 256, 32, device=DEVICE) for _ in range(2))
        query = torch.randn(3, 4, 32, device=DEVICE)
        tables = torch.randperm(6, device=DEVICE).to(torch.int32).view(3, 2)
        lengths = torch.full((3,), 300, dtype=torch.int32, device=DEVICE)
        expected = reference.paged_decode_attention(query, keys, values, tables, lengths, 32**-0.5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("num_sms", [1, 3])
    def test_reading_touches_every_element_once(self, num_sms: int) -> None:
        torch.manual_seed(0)
        work = curves_work.read_work(DEVICE, 4 * 4096 * 37)
        sums = work.prepare(num_sms)()
        torch.manual_seed(0)
        expected = torch.randn(4096 * 37, device=DEVICE).double().sum().item()
        assert sums.double().sum().item() == pytest.approx(expected, abs=0.05)
        assert work.amount == 4 * 4096 * 37

    def test_dense_products_are_those_of_a_layer_planned_for_the_partition(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        limits: list[tuple[int, ...]] = []

        def cublas_sm_limit(*limit: int) -> nullcontext[None]:
            limits.append(limit)
            return nullcontext()

        monkeypatch.setattr(curves_work, "cublas_sm_limit", cublas_sm_limit)
        weights = curves_work.random_weights(SMALL, DEVICE, num_bytes=200_000)
        assert sum(weight.nbytes for weight in weights) >= 200_000
        assert [tuple(weight.shape) for weight in weights[:4]] == layer_matrices(SMALL)
        work = curves_work.dense_work(7, weights, 40)
        work.prepare(16)()
        assert limits == [(16, 40)]
        assert work.amount == sum(2 * 7 * weight.numel() for weight in weights)
        # Even one large layer is not used twice in a row.
        assert len(curves_work.random_weights(SMALL, DEVICE, num_bytes=1)) == 2 * 4


class Manager:
    """Partitions of a device of 40 SMs, whose granted SMs are not those asked for."""

    def __init__(self, device: torch.device, attention: int, ffn: int) -> None:
        self.attention_sms, self.ffn_sms = attention - 1, ffn + 1

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.attention_sms = self.ffn_sms = 0

    def get_attention_stream(self) -> str:
        return f"attention {self.attention_sms}"

    def get_ffn_stream(self) -> str:
        return f"ffn {self.ffn_sms}"


def test_every_stage_runs_on_its_own_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(prepared: str, stream: str) -> Any:
        assert stream in ("whole", prepared)
        return nullcontext(SimpleNamespace(replay=None))

    def work(name: str, stage: str) -> curves_work.Work:
        prepare: Any = f"{stage} {{}}".format
        return curves_work.Work(name, 7, prepare)

    for name, replacement in {
        "GreenContextManager": Manager,
        "captured": captured,
        "steady_seconds": lambda *args: curves.LAUNCHES,
        "copy_bandwidth": lambda device: 4e12,
        "matmul_peak": lambda device, dtype: 7e14,
    }.items():
        monkeypatch.setattr(curves, name, replacement)
    monkeypatch.setattr(curves_work, "random_weights", lambda *args: [])
    monkeypatch.setattr(curves_work, "attention_work", lambda *args: work("attention", "attention"))
    monkeypatch.setattr(curves_work, "read_work", lambda *args: work("read", "attention"))
    monkeypatch.setattr(curves_work, "dense_work", lambda tokens, *args: work(str(tokens), "ffn"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "whole")
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    *_, split, whole = curves.measure(torch.device("cpu"), [(24, 16), (8, 32)])
    assert [point["sms"] for point in split["bandwidth"]] == [7, 23]
    assert [point["sms"] for point in whole["bandwidth"]] == [7, 23, 40]
    assert [point["sms"] for point in whole["gemm"]] == [17, 33, 40]
    assert all(point["read"] == point["attention"] == 7 for point in whole["bandwidth"])
    assert describe(whole)


class TestRecord:
    def test_a_stored_record_is_printed_and_drawn(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored, picture = tmp_path / "curves.json", tmp_path / "curves.png"
        record = make_record()
        write_record(record, stored)
        bench_pipeline.main(["--curves", "--from", str(stored), "--plot", str(picture)])
        *lines, last = capsys.readouterr().out.splitlines()
        assert lines == describe(record).splitlines()
        assert json.loads(last) == record
        height, width, _ = imread(picture).shape
        assert 400 < height < width
        assert 1200 < width < 1600

    def test_a_map_is_no_curves(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_record({"benchmark": "map"}, tmp_path / "map.json")
        with pytest.raises(SystemExit):
            bench_pipeline.main(["--curves", "--from", str(tmp_path / "map.json")])
        assert "--curves" in capsys.readouterr().err
