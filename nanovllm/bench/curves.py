"""What SMs are worth: memory bandwidth and GEMM rate against SM count.

A green context after the other: on its SMs a large copy runs again and again, then large products,
planned for so many SMs, while all other SMs are idle. The last point is the whole device without a
green context, as sequential decode has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from green_ctx import GreenContextError, GreenDevice
from nanovllm.bench import BenchError, report
from nanovllm.bench.ceilings import copy_bandwidth, matmul_peak
from nanovllm.bench.pictures import DPI, heading
from nanovllm.bench.report import Record
from nanovllm.engine.green_manager import GreenContextManager
from nanovllm.engine.pipeline_modes import MIN_FFN_SMS
from nanovllm.kernels.gpu import cublas_sm_limit

# Titles, by the names of the rates in the record.
PANELS = {"TB/s": "a large copy, read and written", "TFLOP/s": "a large product in bfloat16"}


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Measures both curves; yields their record after each point."""
    if args.device.type != "cuda":
        raise BenchError(f"curves need a CUDA GPU, not {args.device}")
    try:
        with torch.cuda.device(args.device):
            yield from measure(args.device, GreenDevice(torch.cuda.current_device()))
    except GreenContextError as error:
        raise BenchError(f"curves need green contexts: {error}") from error


def measure(device: torch.device, gpu: GreenDevice) -> Iterator[Record]:
    """The record so far, after each partition and then after the whole device."""
    total, sizes = gpu.sm_count, gpu.granularity()
    record = report.describe_machine(device, "curves") | {"points": []}
    partitions = range(sizes.round_up(MIN_FFN_SMS), total - sizes.minimum + 1, sizes.alignment)
    for sms in tqdm(partitions, "Curves", unit="partition"):
        with GreenContextManager(device, total - sms, sms) as manager:
            with torch.cuda.stream(manager.get_ffn_stream()):
                record["points"].append(measure_point(device, manager.ffn_sms, total))
            # Neither torch nor cuBLAS gives back the memory of a stream that is closed.
            torch.cuda.empty_cache()
            torch._C._cuda_clearCublasWorkspaces()
        yield record
    record["points"].append(measure_point(device, total, total))
    yield record


def measure_point(device: torch.device, sms: int, device_sms: int) -> Record:
    """The rates on the current stream, which has so many SMs."""
    with cublas_sm_limit(sms, device_sms):
        peak = matmul_peak(device, torch.bfloat16)
    return {"SMs": sms, "TB/s": copy_bandwidth(device) / 1e12, "TFLOP/s": peak / 1e12}


def describe(record: Record) -> str:
    """A row for each number of SMs."""
    rows = [{name: f"{value:.4g}" for name, value in point.items()} for point in record["points"]]
    titles = [f"{rate}: {title}" for rate, title in PANELS.items()]
    return "\n".join([record["device"]["name"], *titles, "", *report.table(rows)])


def draw(record: Record, path: Path) -> None:
    """A panel for each rate, from 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    sms = [point["SMs"] for point in record["points"]]
    for panel, (rate, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        panel.plot(sms, [point[rate] for point in record["points"]], marker="o", markersize=4)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("SMs of the partition; the last point is the whole device", fontsize=9)
        panel.set_ylabel(rate, fontsize=9)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    figure.suptitle(heading(record, "What SMs are worth"), fontsize=11)
    figure.savefig(path, dpi=DPI)
