"""All-reduce with residual and norm on the GPUs of one host: is it right, and how long does it take.

    python tests/gpu/time_all_reduce.py --ranks 2 --json all_reduce.json

Prints, for messages of 8 KB to 16 MB and 4 to 132 programs, microseconds a call of NCCL and of torch's symmetric
memory (with a norm kernel after each) and of one-shot and two-shot `all_reduce_add_norm`, from replays of a
graph of `CALLS` calls; the best of each as bytes a rank has to receive over the measured copy bandwidth of a peer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
import torch.multiprocessing as mp

from nanovllm import kernels
from nanovllm.kernels import all_reduce
from nanovllm.kernels.all_reduce import Peers, all_reduce_add_norm

HIDDEN = 4096
CALLS = 20
ROWS = [1, 8, 32, 64, 128, 256, 512, 1024, 2048]
PROGRAMS = [4, 8, 16, 32, 64, 132, 264]
MAX_PROGRAMS = 264


def symmetric(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    tensor = symm_mem.empty(*shape, dtype=dtype, device=device)
    handle = symm_mem.rendezvous(tensor, dist.group.WORLD.group_name)
    assert not getattr(handle, "multicast_ptr", 0), "multicast must stay off"
    tensor.zero_()
    return tensor, torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device)


def timed(run, replays: int = 5) -> float:
    """Microseconds a call, the median of replays of a graph; the slowest rank's."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    times = []
    for _ in range(replays):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / CALLS)
    out = torch.tensor([statistics.median(times)], device="cuda")
    dist.all_reduce(out, dist.ReduceOp.MAX)
    return round(out.item(), 2)


def main_of(rank: int, size: int, port: int, path: str) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, device_id=device
    )
    dtype, most = torch.bfloat16, max(ROWS)
    buffers = [symmetric((most, HIDDEN), dtype, device) for _ in range(2)]
    results = [symmetric((most, HIDDEN), dtype, device) for _ in range(2)]
    counters, counter_ptrs = symmetric((2, MAX_PROGRAMS, size), torch.int32, device)
    torch.cuda.synchronize()
    dist.barrier()
    peers = Peers(
        rank,
        size,
        counter_ptrs,
        torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=device),
        torch.zeros(1, dtype=torch.int32, device=device),
        MAX_PROGRAMS,
        20_000_000,
    )
    weight = torch.rand(HIDDEN, dtype=dtype, device=device) + 0.5
    dist.broadcast(weight, 0)
    eps = 1e-6

    # Right? Against float32 sums in rank order, in both forms, eager and replayed.
    wrong = []
    for rows in (1, 7, 64, 1000):
        for two_shot in (False, True):
            for programs in (3, 32, 132):
                residual = torch.randn(rows, HIDDEN, dtype=dtype, device=device)
                dist.broadcast(residual, 0)
                expected_residual = residual.clone()
                for turn in range(4):
                    part, part_ptrs = buffers[turn % 2]
                    result, result_ptrs = results[turn % 2]
                    mine = torch.randn(rows, HIDDEN, dtype=dtype, device=device)
                    part[:rows] = mine
                    everyone = [torch.empty_like(mine) for _ in range(size)]
                    dist.all_gather(everyone, mine)
                    if rank == turn % size:
                        torch.cuda._sleep(2_000_000)
                    all_reduce_add_norm(
                        peers,
                        part_ptrs,
                        result_ptrs,
                        (rows, HIDDEN),
                        residual,
                        weight,
                        eps,
                        programs,
                        two_shot,
                    )
                    total = torch.zeros(rows, HIDDEN, device=device)
                    for x in everyone:
                        total += x.float()
                    expected_residual = (total + expected_residual.float()).to(dtype)
                    norm = kernels.rms_norm(expected_residual, weight, eps)
                    own = slice(rank, None, size) if two_shot else slice(None)
                    if not torch.equal(residual[own], expected_residual[own]):
                        wrong.append(("residual", rows, two_shot, programs, turn))
                    if not torch.allclose(
                        result[:rows].float(), norm.float(), rtol=1e-2, atol=1e-3
                    ):
                        wrong.append(("norm", rows, two_shot, programs, turn))
    assert not wrong, wrong[:5]
    assert peers.expired.item() == 0

    # How fast do bytes come from a peer?
    peer = buffers[0][1]
    source = symm_mem.rendezvous(buffers[0][0], dist.group.WORLD.group_name).get_buffer(
        (rank + 1) % size, (most, HIDDEN), dtype
    )
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source))
    rate = most * HIDDEN * 2 / copy / 1000
    del peer

    records = []
    for rows in ROWS:
        x = torch.randn(rows, HIDDEN, dtype=dtype, device=device)
        residual = torch.randn(rows, HIDDEN, dtype=dtype, device=device)
        part = buffers[0][0][:rows]
        record = {"rows": rows, "bytes": rows * HIDDEN * 2}

        def nccl(x=x, residual=residual):
            dist.all_reduce(x)
            kernels.add_rms_norm(x, residual, weight, eps)

        def torch_op(name, part=part, residual=residual):
            y = getattr(torch.ops.symm_mem, name)(part, "sum", dist.group.WORLD.group_name)
            kernels.add_rms_norm(y, residual, weight, eps)

        record["nccl"] = timed(nccl)
        if rows <= 512:
            record["torch one-shot"] = timed(lambda: torch_op("one_shot_all_reduce"))
        record["torch two-shot"] = timed(lambda: torch_op("two_shot_all_reduce_"))
        for two_shot in (False, True):
            if (not two_shot and rows > 256) or (two_shot and rows < 8):
                continue
            for each in (1, 2, 4):
                all_reduce.ROWS = each
                for programs in PROGRAMS:
                    if programs > 4 and programs * each > 2 * rows:
                        continue
                    turn = [0]

                    def ours(
                        two_shot=two_shot,
                        programs=programs,
                        rows=rows,
                        residual=residual,
                        turn=turn,
                    ):
                        turn[0] ^= 1
                        all_reduce_add_norm(
                            peers,
                            buffers[turn[0]][1],
                            results[turn[0]][1],
                            (rows, HIDDEN),
                            residual,
                            weight,
                            eps,
                            programs,
                            two_shot,
                        )

                    record[f"{'two' if two_shot else 'one'}-shot {each}x{programs}"] = timed(ours)
        records.append(record)
        if rank == 0:
            print(json.dumps(record), flush=True)
    assert peers.expired.item() == 0
    if rank == 0:
        name = torch.cuda.get_device_name()
        summary = {"ranks": size, "gpu": name, "peer_copy_GB_s": round(rate, 1), "records": records}
        print(f"{size} x {name}: a copy from a peer {rate:.0f} GB/s")
        Path(path).write_text(json.dumps(summary))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="GPUs to use")
    parser.add_argument("--json", default="all_reduce.json", help="where to write the figures")
    arguments = parser.parse_args()
    mp.spawn(main_of, (arguments.ranks, 29731, arguments.json), nprocs=arguments.ranks)
