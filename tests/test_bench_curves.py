"""`--curves` without a GPU: its splits, its work, its tables and its picture.

Run with `pytest tests/test_bench_curves.py`; it takes some seconds.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

import bench_pipeline
from green_ctx import Granularity
from nanovllm.bench import BenchError, curves, curves_work
from nanovllm.bench.curves import (
    FEWEST_DENSE_SMS,
    MOST_SPLITS,
    TOKENS,
    choose_splits,
    draw_curves,
    format_curves,
    measure_curves,
)
from nanovllm.bench.curves_picture import draw_bandwidth, draw_gemm
from nanovllm.bench.curves_work import AttentionWork, DenseWork, ReadWork, Work, random_layers
from nanovllm.bench.shapes import published_config
from nanovllm.bench.stored import write_record
from nanovllm.bench.timing import steady_seconds
from nanovllm.kernels import reference
from nanovllm.models.qwen3_config import Qwen3Config

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = Qwen3Config.from_dict(
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
        "seconds_per_point": 0.4,
        "dense_library": "cuBLASLt told its SMs",
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
        assert splits[0] == (116, 16)
        assert splits[-1] == (12, 120)

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
            assert dense >= FEWEST_DENSE_SMS
            assert granularity.round_up(dense) == dense

    def test_need_enough_sms(self) -> None:
        with pytest.raises(BenchError, match=r"more than 20 SMs: 16 are for cuBLAS alone"):
            choose_splits(20, Granularity(minimum=8, alignment=8))


class TestWork:
    @pytest.mark.parametrize("num_sms", [1, 7])
    def test_attention_is_computed_and_its_bytes_counted(
        self, monkeypatch: pytest.MonkeyPatch, num_sms: int
    ) -> None:
        monkeypatch.setattr(curves_work, "BLOCK_SIZE", 64)
        work = AttentionWork(SMALL, 3, 150, DEVICE, torch.float32)
        found = work.prepare(num_sms)()
        lengths = torch.full((3,), 150, dtype=torch.int32, device=DEVICE)
        expected = reference.paged_decode_attention(
            work.query, work.keys, work.values, work.tables, lengths, 32**-0.5
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert work.amount == 3 * 150 * 2 * (2 * 32) * 4
        assert work.tables.sort().values.unique().numel() == 9

    @pytest.mark.parametrize("num_sms", [1, 3])
    def test_reading_touches_every_element_once(self, num_sms: int) -> None:
        work = ReadWork(DEVICE, 4 * 4096 * 37)
        sums = work.prepare(num_sms)()
        expected = work.source.double().sum().item()
        assert sums.double().sum().item() == pytest.approx(expected, abs=0.05)
        assert work.source.std().item() == pytest.approx(1, abs=0.1)
        assert work.amount == work.source.nbytes

    def test_dense_products_are_those_of_a_layer_planned_for_the_partition(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        products: list[tuple[torch.Size, torch.Size]] = []
        limits: list[tuple[int, int]] = []

        @contextmanager
        def cublas_sm_limit(num_sms: int, device_sms: int) -> Iterator[None]:
            limits.append((num_sms, device_sms))
            yield
            assert len(products) == 4 * len(layers)

        monkeypatch.setattr(
            curves_work.F, "linear", lambda x, weight: products.append((x.shape, weight.shape))
        )
        monkeypatch.setattr(curves_work, "cublas_sm_limit", cublas_sm_limit)
        layers = random_layers(SMALL, CPU, num_bytes=200_000)
        work = DenseWork(7, layers, 40)
        work.prepare(16)()
        assert limits == [(16, 40)]
        hidden, q_width, inner = 48, 4 * 32, 80
        of_a_layer = [
            ((7, hidden), (q_width + 2 * 2 * 32, hidden)),
            ((7, q_width), (hidden, q_width)),
            ((7, hidden), (2 * inner, hidden)),
            ((7, inner), (hidden, inner)),
        ]
        assert products == of_a_layer * len(layers)
        assert work.amount == sum(2 * rows * out * width for (rows, width), (out, _) in products)
        assert sum(w.nbytes for layer in layers for w in layer) >= 200_000
        assert all(w.count_nonzero() > 0.99 * w.numel() for w in work.weights)

    def test_even_one_large_layer_is_not_used_twice_in_a_row(self) -> None:
        assert len(random_layers(SMALL, CPU, num_bytes=1)) == 2

    def test_time_is_that_of_one_call(self) -> None:
        left = torch.randn(200, 200)
        once = steady_seconds(lambda: left @ left, CPU, 0.02)
        ten = steady_seconds(lambda: [left @ left for _ in range(10)], CPU, 0.05)
        assert 3 < ten / once < 30


class FakeManager:
    """Partitions of a device of 40 SMs, whose granted SMs are not those asked for."""

    def __init__(self, device: torch.device, attention: int, ffn: int) -> None:
        assert attention + ffn == 40
        self.attention_sms, self.ffn_sms = attention - 1, ffn + 1
        self.closed = False

    def __enter__(self) -> FakeManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.closed = True

    def get_attention_stream(self) -> tuple[FakeManager, int]:
        return self, self.attention_sms

    def get_ffn_stream(self) -> tuple[FakeManager, int]:
        return self, self.ffn_sms


class FakeWork(Work):
    """Prepares the SMs it is prepared for, and its name."""

    def prepare(self, num_sms: int) -> Any:
        return num_sms, self.name


def test_every_split_gives_each_stage_a_point_on_its_own_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = object()
    made: list[FakeManager] = []

    def make_manager(*args: Any) -> FakeManager:
        made.append(FakeManager(*args))
        return made[-1]

    @contextmanager
    def captured(prepared: tuple[int, str], stream: Any) -> Iterator[Any]:
        num_sms, name = prepared
        if stream is whole:
            assert num_sms == 40
        else:
            manager, stream_sms = stream
            assert not manager.closed
            assert num_sms == stream_sms
            assert stream_sms == (manager.attention_sms if name in "AR" else manager.ffn_sms)
        yield SimpleNamespace(replay=prepared)
        assert stream is whole or not manager.closed, "the graph goes before its partition"

    def steady(replay: tuple[int, str], device: torch.device, seconds: float) -> float:
        assert seconds == 0.3
        return curves.LAUNCHES / replay[0]

    for name, replacement in {
        "GreenContextManager": make_manager,
        "captured": captured,
        "steady_seconds": steady,
        "sm_count": lambda device: 40,
        "random_layers": lambda config, device: [],
        "AttentionWork": lambda config, sequences, context, device: FakeWork("A", 7),
        "ReadWork": lambda device: FakeWork("R", 5),
        "DenseWork": lambda tokens, layers, device_sms: FakeWork(str(tokens), tokens),
    }.items():
        monkeypatch.setattr(curves, name, replacement)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: whole)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    found = curves.sweep_splits("8B", [(24, 16), (8, 32)], CPU, 0.3, progress=False)
    assert len(made) == 2
    assert all(manager.closed for manager in made)
    # Rates are amounts times SMs here.
    assert found == {
        "bandwidth": [{"sms": n, "A": 7 * n, "R": 5 * n} for n in (7, 23, 40)],
        "gemm": [{"sms": n} | {str(tokens): tokens * n for tokens in TOKENS} for n in (17, 33, 40)],
    }


class TestRecord:
    def test_every_point_has_a_row(self) -> None:
        record = make_record()
        lines = format_curves(record).splitlines()
        assert lines[0] == "Qwen3 8B on NVIDIA Something, measured in 40 s"
        rows = [line.split() for line in lines if line.split()[:1] and line.split()[0].isdigit()]
        count = len(record["bandwidth"])
        assert len(rows) == 2 * count
        for row, point in zip(rows[:count], record["bandwidth"], strict=True):
            sms, attention = point["sms"], point["attention"]
            assert row == [
                str(sms),
                f"{attention / 1e12:.2f}",
                f"{attention / 1e9 / sms:.1f}",
                f"{point['read'] / 1e12:.2f}",
                f"{100 * attention / 4.26e12:.0f}%",
            ]
        for row, point in zip(rows[count:], record["gemm"], strict=True):
            rates = [f"{point[name] / 1e12:.0f}" for name in ("256", "512", "1024")]
            share = f"{100 * point['1024'] / 782e12:.0f}%"
            assert row == [str(point["sms"]), *rates, share]

    def test_says_what_multiplies(self) -> None:
        record = make_record()
        axes = Figure().subplots()
        draw_gemm(axes, record)
        assert axes.get_title() == "dense products of a layer: cuBLASLt told its SMs"
        assert "products of a layer by cuBLASLt told its SMs, TFLOP/s" in format_curves(record)
        del record["dense_library"]
        assert "products of a layer by cuBLAS, TFLOP/s" in format_curves(record)

    def test_survives_json(self, tmp_path: Path) -> None:
        record = make_record()
        again = json.loads(json.dumps(record))
        assert format_curves(again) == format_curves(record)
        for name, one in (("record.png", record), ("again.png", again)):
            draw_curves(one, tmp_path / name)
        assert (imread(tmp_path / "record.png") == imread(tmp_path / "again.png")).all()


class TestPicture:
    def test_is_as_wide_as_a_readme(self, tmp_path: Path) -> None:
        draw_curves(make_record(), tmp_path / "curves.png")
        height, width, _ = imread(tmp_path / "curves.png").shape
        assert 1200 < width < 1600
        assert 400 < height < width

    def test_panels_hold_the_points_and_the_ceilings(self) -> None:
        record = make_record()
        left, right = Figure().subplots(1, 2)
        draw_bandwidth(left, record)
        draw_gemm(right, record)
        self.check(left, record["bandwidth"], {"attention": "attention", "read": "plain read"})
        self.check(right, record["gemm"], {n: f"{n} tokens" for n in ("256", "512", "1024")})
        for axes, ceiling in ((left, 4.26), (right, 782)):
            (dashed,) = (line for line in axes.lines if line.get_linestyle() == "--")
            assert set(dashed.get_ydata()) == {ceiling}
            assert axes.get_ylim()[0] == 0
            assert axes.get_ylim()[1] > ceiling

    def check(self, axes: Axes, points: list[dict[str, Any]], labels: dict[str, str]) -> None:
        lines = {line.get_label(): line for line in axes.lines}
        for name, label in labels.items():
            assert list(lines[label].get_xdata()) == [point["sms"] for point in points]
            rates = [point[name] / 1e12 for point in points]
            assert list(lines[label].get_ydata()) == pytest.approx(rates)

    def test_needs_matplotlib(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(BenchError, match="pip install matplotlib"):
            draw_curves(make_record(), tmp_path / "curves.png")


class TestRefusals:
    def test_of_a_cpu(self) -> None:
        with pytest.raises(BenchError, match="need a CUDA GPU, not cpu"):
            measure_curves(CPU)

    def test_of_an_unknown_shape(self) -> None:
        with pytest.raises(BenchError, match=r"^shape='9B' is not allowed: .* one of 0\.6B, "):
            measure_curves(CPU, shape="9B")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_of_cuda_where_there_is_none(self) -> None:
        with pytest.raises(BenchError, match="need a CUDA GPU, not cuda:0"):
            measure_curves(torch.device("cuda", 0))


class TestCommandLine:
    def test_a_stored_record_is_printed_and_drawn(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        stored, picture = tmp_path / "curves.json", tmp_path / "curves.png"
        record = make_record()
        write_record(record, stored)
        bench_pipeline.main(["--curves", "--from", str(stored), "--plot", str(picture)])
        *lines, last = capsys.readouterr().out.splitlines()
        assert lines == format_curves(record).splitlines()
        assert json.loads(last) == record
        draw_curves(record, tmp_path / "expected.png")
        assert (imread(picture) == imread(tmp_path / "expected.png")).all()

    def test_with_json_the_record_goes_there_alone(
        self,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        record, file = make_record(), tmp_path / "curves.json"
        monkeypatch.setattr(bench_pipeline, "measure_curves", lambda device: record)
        bench_pipeline.main(["--curves", "--device", "cpu", "--json", str(file)])
        assert capsys.readouterr().out.splitlines() == format_curves(record).splitlines()
        assert json.loads(file.read_text(encoding="utf-8")) == record

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--device", "cpu"], "curves need a CUDA GPU, not cpu"),
            (["--from", "a.json", "b.json"], "--curves --from takes one file"),
            (["--from", "nowhere.json"], "--from nowhere.json cannot be read"),
            (["--shape", "8B"], "--shape is an option of --workload decode"),
            (["--plot", "curves.pdf"], "the name must end in .png"),
        ],
    )
    def test_bad_arguments_say_why(
        self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            bench_pipeline.main(["--curves", *argv])
        assert message in capsys.readouterr().err

    def test_a_map_is_no_curves(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_record({"benchmark": "map"}, tmp_path / "map.json")
        with pytest.raises(SystemExit):
            bench_pipeline.main(["--curves", "--from", str(tmp_path / "map.json")])
        assert "does not hold the JSON object of a --curves run" in capsys.readouterr().err
