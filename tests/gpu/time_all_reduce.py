"""All-reduce with residual and norm on the GPUs of one host: microseconds.

    python tests/gpu/time_all_reduce.py --ranks 4 --json all_reduce.json

For messages of 8 KB to 16 MB, and as many programs as fill 4 to 132 SMs: NCCL and torch's symmetric
memory, with a norm kernel after each, and ours, from replays of a graph; then how fast bytes come
from a peer in the same run.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

if __name__ in ("__main__", "__mp_main__"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanovllm import kernels
from nanovllm.layers.peer_memory import MOST_ROWS, PUSHED_ROWS, PeerMemory
from tests.gpu import peer_ranks
from tests.gpu.peer_ranks import HIDDEN

CALLS = 20
REPLAYS = 5
ROWS = [1, 8, 32, 64, 128, 256, 512, 1024, 2048]
SMS = [4, 8, 16, 32, 64, 132]
EPS = 1e-6


def microseconds(run: Callable[[], object]) -> float:
    """Of a call, the median of replays of a graph of calls; the slowest rank's."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    times = []
    for _ in range(REPLAYS):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / CALLS)
    slowest = torch.tensor([statistics.median(times)], device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return round(slowest.item(), 2)


def time_rows(memory: PeerMemory, rows: int) -> dict[str, float]:
    """Microseconds by what does it."""
    name = memory.group.group_name
    x = torch.randn(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    residual, weight = torch.randn_like(x), torch.randn_like(x[0])
    part = memory.part(0, 0, rows)
    assert part is not None
    symmetric = symm_mem.empty(rows, HIDDEN, dtype=torch.bfloat16, device="cuda")
    symm_mem.rendezvous(symmetric, name)

    def then_norm(y: torch.Tensor) -> None:
        kernels.add_rms_norm(y, residual, weight, EPS)

    def nccl() -> None:
        dist.all_reduce(x)
        then_norm(x)

    times = {"nccl": microseconds(nccl)}
    for kind in ("one_shot_all_reduce", "two_shot_all_reduce_"):
        operation = getattr(torch.ops.symm_mem, kind)
        times[f"torch {kind}"] = microseconds(
            lambda op=operation: then_norm(op(symmetric, "sum", name))
        )
    turns = [0]

    def pushed() -> None:
        turns[0] ^= 1  # neighbours use different buffers
        memory.add_norm(part, turns[0], 0, residual, weight, EPS)

    if rows <= PUSHED_ROWS:
        times["pushed"] = microseconds(pushed)
    for two_shot in (False, True):
        for sms in SMS:
            turns = [0]
            own = -(-rows // memory.size) if two_shot else rows
            programs = min(own, sms * memory.kernels.programs_per_sm(HIDDEN))

            def ours(two_shot: bool = two_shot, programs: int = programs, turns=turns) -> None:
                turns[0] ^= 1  # neighbours use different buffers
                memory.kernels.all_reduce_add_norm(
                    memory.peers, memory.parts[turns[0]].addresses, memory.scattered.addresses,
                    memory.results[turns[0]].addresses, 0, (rows, HIDDEN), residual, weight, EPS,
                    programs, two_shot,
                )  # fmt: skip

            times[f"{'two' if two_shot else 'one'}-shot, {sms} SMs"] = microseconds(ours)
    return times


def time_all(memory: PeerMemory, path: str) -> None:
    records = []
    for rows in ROWS:
        record = {"rows": rows, "bytes": rows * HIDDEN * 2, "us": time_rows(memory, rows)}
        records.append(record)
        if memory.rank == 0:
            print(json.dumps(record), flush=True)
    assert memory.peers.expired.item() == 0
    own = symm_mem.empty(MOST_ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda")
    handle = symm_mem.rendezvous(own, memory.group.group_name)
    target = torch.empty_like(own)
    source = handle.get_buffer((memory.rank + 1) % memory.size, target.shape, target.dtype)
    copy = microseconds(lambda: target.copy_(source))
    rate = MOST_ROWS * HIDDEN * 2 / copy / 1000
    if memory.rank == 0:
        gpu = torch.cuda.get_device_name()
        print(f"{memory.size} x {gpu}: a copy from a peer {rate:.0f} GB/s")
        summary = {"ranks": memory.size, "gpu": gpu, "peer_copy_GB_s": rate, "records": records}
        Path(path).write_text(json.dumps(summary))


if __name__ == "__main__":
    peer_ranks.run_command(__doc__, time_all, "all_reduce.json")
