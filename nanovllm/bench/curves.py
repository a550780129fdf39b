"""What SMs are worth to each stage: attention bandwidth and GEMM rate against SM count.

A green context after the other: on its SMs decode attention runs again and again, then the dense
products of a layer, planned for so many SMs, while all other SMs are idle. The last point is the
whole device without a green context, as sequential decode has it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from green_ctx import GreenContextError, GreenDevice
from nanovllm.bench import BenchError, report
from nanovllm.bench.ceilings import copy_bandwidth, matmul_peak, steady_seconds
from nanovllm.bench.pictures import DPI, heading
from nanovllm.bench.report import Record
from nanovllm.bench.shapes import published_config
from nanovllm.engine.green_manager import GreenContextManager
from nanovllm.engine.pipeline import MIN_DENSE_SMS
from nanovllm.models import ModelConfig, parse_config

SHAPE = "8B"
SECONDS = 0.4
# Enough sequences for any device, and many times its L2 cache.
SEQUENCES, CONTEXT, BLOCK_SIZE = 256, 1024, 256
# Rows of the dense products, as a micro-batch of a pipeline has.
TOKENS = 512
# Whose weights are used in turn, so that no L2 cache holds them.
LAYERS = 2
# What is measured, by the unit of its rate, which counts in 1e12.
WHAT = {
    "TB/s": f"decode attention, {SEQUENCES} sequences of {CONTEXT} tokens",
    "TFLOP/s": f"dense products of a layer, {TOKENS} tokens",
}


# For a number of SMs, what issues some work once on the current stream.
Prepare = Callable[[int], Callable[[], object]]


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Measures both curves; yields their record after each split."""
    if args.device.type != "cuda":
        raise BenchError(f"curves need a CUDA GPU, not {args.device}")
    try:
        with torch.inference_mode(), torch.cuda.device(args.device):
            yield from measure(args.device, GreenDevice(torch.cuda.current_device()))
    except GreenContextError as error:
        raise BenchError(f"curves need green contexts: {error}") from error


def measure(device: torch.device, gpu: GreenDevice) -> Iterator[Record]:
    """The record so far, after each partition and then after the whole device."""
    total, sizes = gpu.sm_count, gpu.granularity()
    config = parse_config(published_config(SHAPE))
    works = attention_work(config, device), dense_work(config, device, total)
    record = report.describe_machine(device, "curves") | {"points": []} | ceilings(device)
    dense = range(sizes.round_up(MIN_DENSE_SMS), total - sizes.minimum + 1, sizes.alignment)
    for sms in tqdm(dense, "Curves", unit="partition"):
        with GreenContextManager(device, total - sms, sms) as manager:
            record["points"].append(measure_point(works, manager.get_ffn_stream(), manager.ffn_sms))
        # cuBLAS keeps a workspace for every stream it has seen, also for those now closed.
        torch._C._cuda_clearCublasWorkspaces()
        yield record
    record["points"].append(measure_point(works, torch.cuda.Stream(device), total))
    yield record | ceilings(device)  # as warm as it was for the points


def ceilings(device: torch.device) -> Record:
    """The rates of a large copy and of a large product on the whole device."""
    rates = copy_bandwidth(device), matmul_peak(device, torch.bfloat16)
    return {"ceilings": dict(zip(WHAT, (rate / 1e12 for rate in rates), strict=True))}


def measure_point(
    works: tuple[tuple[int, Prepare], ...], stream: torch.cuda.Stream, sms: int
) -> Record:
    """The rates of both kinds of work on so many SMs."""
    torch.cuda.synchronize()  # streams of a partition do not wait for what the work reads
    with torch.cuda.stream(stream):
        rates = [amount / 1e12 / steady_seconds(prepare(sms), SECONDS) for amount, prepare in works]
    torch.cuda.synchronize()
    return {"SMs": sms, **dict(zip(WHAT, rates, strict=True))}


def attention_work(
    config: ModelConfig,
    device: torch.device,
    sequences: int = SEQUENCES,
    context: int = CONTEXT,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[int, Prepare]:
    """Paged decode attention over random keys and values, whose bytes count."""
    from nanovllm.kernels.paged_decode import DecodeWorkspace, paged_decode_attention, tile_offsets

    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q_heads, kv_heads, head_dim = heads
    blocks = -(-context // BLOCK_SIZE)
    shape = (sequences * blocks, kv_heads, BLOCK_SIZE, head_dim)
    keys, values = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    query = torch.randn(sequences, q_heads, head_dim, dtype=dtype, device=device)
    # In any order, as after many requests have come and gone.
    order = torch.randperm(sequences * blocks, device=device)
    tables = order.to(torch.int32).view(sequences, blocks)
    counts = np.full(sequences, context, np.int32)
    lengths = torch.from_numpy(counts).to(device)
    offsets = torch.from_numpy(tile_offsets(counts)).to(device)

    def prepare(sms: int) -> Callable[[], torch.Tensor]:
        workspace = DecodeWorkspace(sms, *heads, device)
        return lambda: paged_decode_attention(
            query, keys, values, tables, lengths, head_dim**-0.5, offsets, workspace
        )

    return sequences * context * 2 * kv_heads * head_dim * dtype.itemsize, prepare


def dense_work(
    config: ModelConfig, device: torch.device, device_sms: int, tokens: int = TOKENS
) -> tuple[int, Prepare]:
    """QKV, output, gate with up, and down of `LAYERS` layers, as a pipeline's lane issues them."""
    from nanovllm.kernels.gpu import cublas_sm_limit

    hidden, inner = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    sizes = [(q_width + 2 * kv_width, hidden), (hidden, q_width)]
    sizes += [(2 * inner, hidden), (hidden, inner)]

    def random(size: tuple[int, int]) -> torch.Tensor:
        return torch.randn(size, dtype=torch.bfloat16, device=device)

    weights = [random(size) for size in sizes * LAYERS]
    inputs = {width: random((tokens, width)) for _, width in sizes}

    def prepare(sms: int) -> Callable[[], None]:
        def multiply() -> None:
            with cublas_sm_limit(sms, device_sms):
                for weight in weights:
                    F.linear(inputs[weight.shape[1]], weight)

        return multiply

    return 2 * tokens * sum(weight.numel() for weight in weights), prepare


def describe(record: Record) -> str:
    """A row for each number of SMs."""
    lines = [f"Layers of {SHAPE} in bfloat16 on {record['device']['name']}"]
    lines += [
        f"{unit}: {WHAT[unit]}; at best, on all SMs: {most:.4g}"
        for unit, most in record["ceilings"].items()
    ]
    rows = [{name: f"{value:.4g}" for name, value in point.items()} for point in record["points"]]
    return "\n".join([*lines, "", *report.table(rows)])


def draw(record: Record, path: Path) -> None:
    """A panel for each stage; dashed: what the whole device does at best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2)
    sms = [point["SMs"] for point in record["points"]]
    for panel, (unit, most) in zip(panels, record["ceilings"].items(), strict=True):
        panel.plot(sms, [point[unit] for point in record["points"]], marker="o", markersize=4)
        panel.axhline(most, linestyle="--", linewidth=1)
        panel.set_title(WHAT[unit], fontsize=10)
        panel.set_xlabel("SMs of the partition; the last point is the whole device", fontsize=9)
        panel.set_ylabel(unit, fontsize=9)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
    what = f"What SMs are worth to each stage: layers of {SHAPE} in bfloat16"
    figure.suptitle(heading(record, what), fontsize=11)
    figure.savefig(path, dpi=DPI)
