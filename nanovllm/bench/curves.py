"""What SMs are worth to each stage: attention bandwidth and GEMM rate against SM count.

    record = measure_curves(torch.device("cuda", 0), shape="8B")
    print(format_curves(record))
    draw_curves(record, Path("curves.png"))

One green-context split after the other, as a pipeline would make them: dense products run on the
aligned group, planned for its SMs; decode attention, and a plain read beside it, on all that is
left. The last point is the whole device without a split, as sequential decode has it. Every rate is
that of a CUDA graph with one kind of work in it, replayed again and again, while the other
partition is idle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from green_ctx import Granularity, GreenContextError, GreenDevice
from nanovllm.bench import BenchError, DoesNotFit
from nanovllm.bench.arms import Split
from nanovllm.bench.curves_picture import draw_curves, library_of
from nanovllm.bench.curves_work import (
    AttentionWork,
    DenseWork,
    ReadWork,
    Work,
    dense_library,
    random_layers,
)
from nanovllm.bench.floor import measure_copy_bandwidth
from nanovllm.bench.prefill import measure_matmul_peak
from nanovllm.bench.report import describe_machine
from nanovllm.bench.shapes import SIZES, published_config
from nanovllm.bench.timing import steady_seconds
from nanovllm.engine.green_manager import GreenContextManager
from nanovllm.engine.model_runner import sm_count
from nanovllm.models.qwen3_config import Qwen3Config

__all__ = ["draw_curves", "format_curves", "measure_curves"]

BENCHMARK = "curves"
SECONDS = 0.4
MOST_SPLITS = 10
# Enough sequences for any device, and many times its L2 cache.
SEQUENCES, CONTEXT = 256, 1024
# Rows of the dense products, as the micro-batches of a pipeline have.
TOKENS = (256, 512, 1024)
# NOTE: on fewer, kernels of cuBLAS that launch clusters of thread blocks fail.
FEWEST_DENSE_SMS = 16
# Of the work in each graph, so that what lies between two replays does not count.
LAUNCHES = 4

# SMs as "sms", and by the name of each work its rate, in bytes or flops per second.
Point = dict[str, Any]


@torch.inference_mode()
def measure_curves(
    device: torch.device, shape: str = "8B", seconds: float = SECONDS, progress: bool = True
) -> dict[str, Any]:
    """Measures all curves; returns their record. Takes under a minute.

    Args:
        device: a CUDA device with nothing else running on it.
        shape: one of `SIZES`, whose heads and layers are taken.
        seconds: of work in a row for each point.
        progress: whether to show a progress bar.

    Raises:
        DoesNotFit: there is not enough memory.
        BenchError: there is no such shape, no CUDA device, no green contexts or no Triton.
    """
    start = time.perf_counter()
    if shape not in SIZES:
        raise BenchError(f"shape={shape!r} is not allowed: it must be one of {', '.join(SIZES)}")
    with plain_errors():
        splits = choose_splits(*device_sizes(device))
        with torch.cuda.device(device):
            curves = sweep_splits(shape, splits, device, seconds, progress)
            ceilings = {
                "copy_bandwidth": measure_copy_bandwidth(device),
                "matmul_peak": measure_matmul_peak(device, torch.bfloat16),
            }
    return {
        **describe_machine(device, BENCHMARK),
        "shape": shape,
        "sequences": SEQUENCES,
        "context": CONTEXT,
        "seconds_per_point": seconds,
        "dense_library": dense_library(),
        **curves,
        **ceilings,
        "curves_seconds": time.perf_counter() - start,
    }


@contextmanager
def plain_errors() -> Iterator[None]:
    """Makes what a machine lacks a BenchError."""
    try:
        yield
    except GreenContextError as error:
        raise BenchError(f"curves need green contexts: {error}") from error
    except ImportError as error:
        raise BenchError(f"curves need Triton: {error}") from error
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(str(error)) from error


def device_sizes(device: torch.device) -> tuple[int, Granularity]:
    """SMs of a CUDA device, and of the groups that it makes."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BenchError(f"curves need a CUDA GPU, not {device}")
    gpu = GreenDevice(torch.cuda.current_device() if device.index is None else device.index)
    return gpu.sm_count, gpu.granularity()


def choose_splits(total: int, granularity: Granularity) -> list[Split]:
    """SMs of attention and of the dense side, all of the device, evenly spread.

    Raises:
        BenchError: there is no such split.
    """
    smallest = granularity.round_up(FEWEST_DENSE_SMS)
    largest = total - granularity.minimum
    sizes = range(smallest, largest + 1, granularity.alignment)
    if not sizes:
        raise BenchError(f"curves need more than {total} SMs: {smallest} are for cuBLAS alone")
    chosen = np.linspace(0, len(sizes) - 1, min(len(sizes), MOST_SPLITS)).round().astype(int)
    return [(total - sizes[i], sizes[i]) for i in chosen.tolist()]


def sweep_splits(
    shape: str, splits: Sequence[Split], device: torch.device, seconds: float, progress: bool
) -> dict[str, list[Point]]:
    """The points of both stages, few SMs first."""
    config = Qwen3Config.from_dict(published_config(shape))
    layers, device_sms = random_layers(config, device), sm_count(device)
    streaming = [AttentionWork(config, SEQUENCES, CONTEXT, device), ReadWork(device)]
    dense = [DenseWork(tokens, layers, device_sms) for tokens in TOKENS]
    bandwidth: list[Point] = []
    gemm: list[Point] = []
    total = (len(splits) + 1) * (len(streaming) + len(dense))
    with tqdm(desc="Curves", total=total, unit="point", disable=not progress) as bar:

        def measure(works: Sequence[Work], stream: torch.cuda.Stream, num_sms: int) -> Point:
            bar.set_postfix_str(f"{num_sms} SMs")
            point: Point = {"sms": num_sms}
            for work in works:
                with captured(work.prepare(num_sms), stream) as graph:
                    once = steady_seconds(graph.replay, device, seconds) / LAUNCHES
                point[work.name] = work.amount / once
                bar.update()
            return point

        for split in splits:
            with GreenContextManager(device, *split) as manager:
                attention, ffn = manager.get_attention_stream(), manager.get_ffn_stream()
                bandwidth.append(measure(streaming, attention, manager.attention_sms))
                gemm.append(measure(dense, ffn, manager.ffn_sms))
            # cuBLAS keeps a workspace for every stream it has seen, also for those now closed.
            torch._C._cuda_clearCublasWorkspaces()
        stream = torch.cuda.Stream(device)
        bandwidth.append(measure(streaming, stream, device_sms))
        gemm.append(measure(dense, stream, device_sms))
    by_sms = {"bandwidth": bandwidth, "gemm": gemm}
    return {name: sorted(points, key=lambda p: p["sms"]) for name, points in by_sms.items()}


@contextmanager
def captured(issue: Callable[[], object], stream: torch.cuda.Stream) -> Iterator[Any]:
    """A CUDA graph that issues the work `LAUNCHES` times on `stream`; freed afterwards."""
    torch.cuda.synchronize()  # streams of a partition do not wait for what `issue` reads
    with torch.cuda.stream(stream):
        issue()  # outside: compiles kernels, makes handles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        main = torch.cuda.current_stream()
        stream.wait_event(main.record_event())
        with torch.cuda.stream(stream):
            for _ in range(LAUNCHES):
                issue()
        main.wait_event(stream.record_event())
    try:
        yield graph
    finally:
        torch.cuda.synchronize()
        graph.reset()


def format_curves(record: dict[str, Any]) -> str:
    """A table for each stage, with the ceilings of the whole device."""
    copy, peak = record["copy_bandwidth"], record["matmul_peak"]
    tokens = [name for name in record["gemm"][0] if name != "sms"]
    head = f"{'SMs':>5}" + "".join(f"{name:>9}" for name in tokens) + f"{'of peak':>10}"
    return "\n".join(
        [
            f"Qwen3 {record['shape']} on {record['device']['name']}, "
            f"measured in {record['curves_seconds']:.0f} s",
            "",
            f"Decode attention, {record['sequences']} sequences of {record['context']} tokens; "
            f"a copy on all SMs reaches {copy / 1e12:.2f} TB/s",
            f"{'SMs':>5}{'TB/s':>9}{'GB/s an SM':>12}{'read, TB/s':>12}{'of copy':>10}",
            *(format_bandwidth(point, copy) for point in record["bandwidth"]),
            "",
            f"Dense products of a layer by {library_of(record)}, TFLOP/s, for so many tokens; "
            f"a large product on all SMs reaches {peak / 1e12:.0f}",
            head,
            *(format_gemm(point, tokens, peak) for point in record["gemm"]),
        ]
    )


def format_bandwidth(point: Point, copy_bandwidth: float) -> str:
    sms, attention = point["sms"], point["attention"]
    return (
        f"{sms:>5}{attention / 1e12:>9.2f}{attention / sms / 1e9:>12.1f}"
        f"{point['read'] / 1e12:>12.2f}{attention / copy_bandwidth:>10.0%}"
    )


def format_gemm(point: Point, tokens: Sequence[str], peak: float) -> str:
    rates = "".join(f"{point[name] / 1e12:>9.0f}" for name in tokens)
    return f"{point['sms']:>5}{rates}{point[tokens[-1]] / peak:>10.0%}"
