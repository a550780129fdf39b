"""`--curves` without a GPU: its partitions, its work, its table and its picture."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from green_ctx import Granularity
from nanovllm.bench import curves
from nanovllm.bench.shapes import published_config
from nanovllm.kernels import reference
from nanovllm.models import parse_config

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = parse_config(
    published_config("0.6B")
    | {"hidden_size": 48, "intermediate_size": 80, "head_dim": 32}
    | {"num_attention_heads": 4, "num_key_value_heads": 2}
)


@pytest.mark.parametrize("num_sms", [1, 7])
def test_attention_and_its_bytes(num_sms: int) -> None:
    torch.manual_seed(0)
    amount, prepare = curves.attention_work(SMALL, DEVICE, 3, 300, torch.float32)
    found = prepare(num_sms)()
    assert amount == 3 * 300 * 2 * (2 * 32) * 4
    # The same random numbers, in the plain form.
    torch.manual_seed(0)
    keys, values = (torch.randn(6, 2, 256, 32, device=DEVICE) for _ in range(2))
    query = torch.randn(3, 4, 32, device=DEVICE)
    tables = torch.randperm(6, device=DEVICE).to(torch.int32).view(3, 2)
    lengths = torch.full((3,), 300, dtype=torch.int32, device=DEVICE)
    expected = reference.paged_decode_attention(query, keys, values, tables, lengths, 32**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_dense_products_are_those_of_layers_planned_for_the_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[tuple[int, ...]] = []
    sizes: list[tuple[int, ...]] = []

    def cublas_sm_limit(*limit: int) -> nullcontext[None]:
        limits.append(limit)
        return nullcontext()

    monkeypatch.setattr("nanovllm.kernels.gpu.cublas_sm_limit", cublas_sm_limit)
    monkeypatch.setattr(
        curves.F, "linear", lambda x, weight: sizes.append((*x.shape, *weight.shape))
    )
    amount, prepare = curves.dense_work(SMALL, DEVICE, device_sms=40, tokens=7)
    prepare(16)()
    assert limits == [(16, 40)]
    of_a_layer = [(7, 48, 256, 48), (7, 128, 48, 128), (7, 48, 160, 48), (7, 80, 48, 80)]
    assert sizes == of_a_layer * curves.LAYERS
    assert amount == sum(2 * 7 * outputs * inputs for _, inputs, outputs, _ in sizes)


class Manager:
    """Partitions of a device of 40 SMs, whose granted SMs are one more than asked for."""

    def __init__(self, device: torch.device, attention: int, ffn: int) -> None:
        assert attention + ffn == 40
        self.ffn_sms = ffn + 1

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.ffn_sms = 0

    def get_ffn_stream(self) -> str:
        return f"{self.ffn_sms} SMs"


def test_all_work_runs_on_every_partition(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    streams: list[str] = []

    def on(stream: str) -> nullcontext[None]:
        streams.append(stream)
        return nullcontext()

    def work(*args: object) -> Any:
        return 5e12, lambda sms: lambda: sms

    for name, replacement in {
        "GreenContextManager": Manager,
        "steady_seconds": lambda call, seconds: call(),
        "copy_bandwidth": lambda device: 4e12,
        "matmul_peak": lambda device, dtype: 7e14,
        "attention_work": work,
        "dense_work": work,
    }.items():
        monkeypatch.setattr(curves, name, replacement)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "whole")
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    gpu: Any = SimpleNamespace(sm_count=40, granularity=lambda: Granularity(8, 8))
    *_, record = curves.measure(torch.device("cpu"), gpu)
    assert streams == ["17 SMs", "25 SMs", "33 SMs", "whole"]
    assert [point["SMs"] for point in record["points"]] == [17, 25, 33, 40]
    for point in record["points"]:
        assert point["TB/s"] == point["TFLOP/s"] == 5 / point["SMs"]
    assert record["ceilings"] == {"TB/s": 4.0, "TFLOP/s": 700.0}
    assert "17   0.2941   0.2941" in curves.describe(record)
    curves.draw(record, tmp_path / "curves.png")
    height, width, _ = imread(tmp_path / "curves.png").shape
    assert 400 < height < width < 1600
