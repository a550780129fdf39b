"""What SMs are worth to each stage: attention bandwidth and GEMM rate against SM count.

One green-context split after the other, as a pipeline would make them: dense products run on the
aligned group, planned for its SMs; decode attention, and a plain read beside it, on all that is
left. The last point is the whole device without a split, as sequential decode has it. Every rate is
that of a CUDA graph with one kind of work in it, replayed again and again, while the other
partition is idle.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from green_ctx import Granularity, GreenContextError, GreenDevice
from nanovllm.bench import BenchError, DoesNotFit, report
from nanovllm.bench.arms import Split
from nanovllm.bench.ceilings import copy_bandwidth, matmul_peak, steady_seconds
from nanovllm.bench.pictures import draw_curves as draw
from nanovllm.bench.report import Record
from nanovllm.bench.shapes import published_config
from nanovllm.engine.green_manager import GreenContextManager
from nanovllm.engine.pipeline_modes import MIN_DENSE_SMS
from nanovllm.models import parse_config

if TYPE_CHECKING:
    from nanovllm.bench.curves_work import Work

__all__ = ["describe", "draw", "run"]

SHAPE = "8B"
SECONDS = 0.4
MOST_SPLITS = 10
# Enough sequences for any device, and many times its L2 cache.
SEQUENCES, CONTEXT = 256, 1024
# Rows of the dense products, as the micro-batches of a pipeline have.
TOKENS = (256, 512, 1024)
# Of the work in each graph, so that what lies between two replays does not count.
LAUNCHES = 4


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Measures all curves and yields their record after each split, or reads it from a file."""
    if args.stored is not None:
        yield report.read_record(args.stored[0], "curves")
        return
    try:
        splits = choose_splits(*device_sizes(args.device))
        with torch.inference_mode(), torch.cuda.device(args.device):
            yield from measure(args.device, splits)
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
    """SMs of attention and of the dense side, all of the device, evenly spread."""
    smallest = granularity.round_up(MIN_DENSE_SMS)
    largest = total - granularity.minimum
    sizes = range(smallest, largest + 1, granularity.alignment)
    if not sizes:
        raise BenchError(f"curves need more than {total} SMs: {smallest} are for cuBLAS alone")
    chosen = np.linspace(0, len(sizes) - 1, min(len(sizes), MOST_SPLITS)).round().astype(int)
    return [(total - sizes[i], sizes[i]) for i in chosen.tolist()]


def measure(device: torch.device, splits: Sequence[Split]) -> Iterator[Record]:
    """The record so far, after each split and then after the whole device."""
    from nanovllm.bench import curves_work

    start = time.perf_counter()
    total = sum(splits[0])
    config = parse_config(published_config(SHAPE))
    weights = curves_work.random_weights(config, device)
    streaming = [
        curves_work.attention_work(config, SEQUENCES, CONTEXT, device),
        curves_work.read_work(device),
    ]
    dense = [curves_work.dense_work(tokens, weights, total) for tokens in TOKENS]
    record = report.describe_machine(device, "curves") | {
        "shape": SHAPE,
        "sequences": SEQUENCES,
        "context": CONTEXT,
        "seconds_per_point": SECONDS,
        "dense_library": curves_work.dense_library(),
        **ceilings(device),
    }
    bandwidth: list[Record] = []
    gemm: list[Record] = []

    def so_far() -> Record:
        points = {"bandwidth": bandwidth, "gemm": gemm}
        in_order = {name: sorted(of, key=lambda point: point["sms"]) for name, of in points.items()}
        return record | in_order | {"curves_seconds": time.perf_counter() - start}

    with tqdm(desc="Curves", total=len(splits) + 1, unit="split") as bar:
        for split in splits:
            bar.set_postfix_str(f"{split[0]}+{split[1]} SMs")
            with GreenContextManager(device, *split) as manager:
                attention, ffn = manager.get_attention_stream(), manager.get_ffn_stream()
                point = measure_point(streaming, device, attention, manager.attention_sms)
                bandwidth.append(point)
                gemm.append(measure_point(dense, device, ffn, manager.ffn_sms))
            # cuBLAS keeps a workspace for every stream it has seen, also for those now closed.
            torch._C._cuda_clearCublasWorkspaces()
            bar.update()
            yield so_far()
        stream = torch.cuda.Stream(device)
        bandwidth.append(measure_point(streaming, device, stream, total))
        gemm.append(measure_point(dense, device, stream, total))
        bar.update()
    record |= ceilings(device)  # again, as warm as it was for the points
    yield so_far()


def ceilings(device: torch.device) -> Record:
    return {
        "copy_bandwidth": copy_bandwidth(device),
        "matmul_peak": matmul_peak(device, torch.bfloat16),
    }


def measure_point(
    works: Sequence[Work], device: torch.device, stream: torch.cuda.Stream, num_sms: int
) -> Record:
    """The rate of each work in bytes or flops per second, by its name, and the SMs as "sms"."""
    point: Record = {"sms": num_sms}
    for work in works:
        with captured(work.prepare(num_sms), stream) as graph:
            seconds = steady_seconds(graph.replay, device, SECONDS) / LAUNCHES
        point[work.name] = work.amount / seconds
    return point


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


def describe(record: Record) -> str:
    """A table for each stage, with the ceilings of the whole device."""
    copy, peak = record["copy_bandwidth"], record["matmul_peak"]
    tokens = [name for name in record["gemm"][0] if name != "sms"]
    streaming = [["SMs", "TB/s", "GB/s an SM", "read, TB/s", "of copy"]]
    for point in record["bandwidth"]:
        sms, rate = point["sms"], point["attention"]
        cells = f"{rate / 1e12:.2f}", f"{rate / sms / 1e9:.1f}", f"{point['read'] / 1e12:.2f}"
        streaming.append([str(sms), *cells, f"{rate / copy:.0%}"])
    dense = [["SMs", *tokens, "of peak"]]
    for point in record["gemm"]:
        rates = [f"{point[name] / 1e12:.0f}" for name in tokens]
        dense.append([str(point["sms"]), *rates, f"{point[tokens[-1]] / peak:.0%}"])
    return "\n".join(
        [
            f"Layers of {record['shape']} on {record['device']['name']}, measured in "
            f"{record['curves_seconds']:.0f} s",
            "",
            f"Decode attention, {record['sequences']} sequences of {record['context']} tokens; "
            f"a copy on all SMs reaches {copy / 1e12:.2f} TB/s",
            *report.table(streaming),
            "",
            f"Dense products of a layer by {record.get('dense_library', 'cuBLAS')}, TFLOP/s, for "
            f"so many tokens; a large product on all SMs reaches {peak / 1e12:.0f}",
            *report.table(dense),
        ]
    )
