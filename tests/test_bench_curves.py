"""`--curves` without a GPU: its partitions, its table and its picture."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from green_ctx import Granularity
from nanovllm.bench import curves


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


def test_every_partition_is_measured_on_its_stream(monkeypatch, tmp_path):
    streams: list[str] = []
    limits: list[tuple[int, ...]] = []

    def on(stream: str) -> nullcontext[None]:
        streams.append(stream)
        return nullcontext()

    def cublas_sm_limit(*limit: int) -> nullcontext[None]:
        limits.append(limit)
        return nullcontext()

    monkeypatch.setattr(curves, "GreenContextManager", Manager)
    monkeypatch.setattr(curves, "cublas_sm_limit", cublas_sm_limit)
    monkeypatch.setattr(curves, "copy_bandwidth", lambda device: 1e11 * limits[-1][0])
    monkeypatch.setattr(curves, "matmul_peak", lambda device, dtype: 1e13 * limits[-1][0])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    gpu: Any = SimpleNamespace(sm_count=40, granularity=lambda: Granularity(8, 8))
    *_, record = curves.measure(torch.device("cpu"), gpu)
    assert streams == ["17 SMs", "25 SMs", "33 SMs"]
    assert limits == [(17, 40), (25, 40), (33, 40), (40, 40)]
    rates = [(point["TB/s"], point["TFLOP/s"]) for point in record["points"]]
    assert rates == [pytest.approx((sms / 10, sms * 10)) for sms, _ in limits]
    assert curves.describe(record).splitlines()[-1].split() == ["40", "4", "400"]
    curves.draw(record, tmp_path / "curves.png")
    height, width, _ = imread(tmp_path / "curves.png").shape
    assert 400 < height < width < 1600
