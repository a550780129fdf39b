"""Drawing tokens from a vocabulary that is split over the GPUs of one host: microseconds.

    python tests/gpu/time_sampling.py --ranks 4 --json sampling.json

512 rows of 151,936 logits: greedy, with a temperature, with a top-k of 20, with a top-p of 0.9.
Beside it what one rank takes for all of the vocabulary, in the same run: as an engine does it, from
the host, and from replays of a graph, which is the GPU's part.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

if __name__ in ("__main__", "__mp_main__"):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanovllm import SamplingParams
from nanovllm.kernels.reference_sampling import SAMPLE_TILE
from nanovllm.layers.parallel import ParallelGroup, Shard
from nanovllm.layers.peer_memory import PeerMemory
from nanovllm.layers.sampler import SamplingBatch, sample
from tests.gpu import peer_ranks
from tests.gpu.time_all_reduce import CALLS, REPLAYS, microseconds

ROWS, VOCAB = 512, 151_936
WAYS = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "top-k 20": {"temperature": 0.8, "top_k": 20},
    "top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "top-k 20, top-p 0.9": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
}


def microseconds_from_the_host(draw: Callable[[], object]) -> float:
    """Of a call, the median of rounds of calls; the slowest rank's."""
    times = []
    for _ in range(REPLAYS):
        dist.barrier()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            draw()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e6 / CALLS)
    slowest = torch.tensor([statistics.median(times)], device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return round(slowest.item(), 1)


def time_all(memory: PeerMemory, path: str) -> None:
    one, device = ParallelGroup(), torch.device("cuda", memory.rank)
    several = ParallelGroup(memory.rank, memory.size, memory.group, peers=memory)
    generator = torch.Generator("cuda").manual_seed(0)  # the same logits on all ranks
    logits = 3 * torch.randn(ROWS, VOCAB, device=device, generator=generator)
    logits = logits.to(torch.bfloat16)
    shards = [Shard.of_tiles(VOCAB, SAMPLE_TILE, group) for group in (one, several)]
    times: dict[str, dict[str, float]] = {}
    for way, options in WAYS.items():
        params = [SamplingParams(**options)] * ROWS
        packed = SamplingBatch.pack(params, range(ROWS), [7] * ROWS, range(ROWS), VOCAB)
        batch = SamplingBatch.unpack(packed, device)
        drawn = []
        times[way] = {}
        for group, shard in zip((one, several), shards, strict=True):
            part = logits[:, shard.start : shard.start + shard.size].contiguous()
            draw = partial(sample, part, batch, group, shard)
            drawn.append(draw())
            times[way][f"ranks: {group.size}"] = microseconds_from_the_host(draw)
            times[way][f"ranks: {group.size}, graph"] = microseconds(draw)
        # A sum of probabilities may round differently, and then end at another token.
        times[way]["other tokens"] = int((drawn[0] != drawn[1]).sum())
        if memory.rank == 0:
            print(way, times[way], flush=True)
    assert memory.peers.expired.item() == 0
    dist.barrier()
    if memory.rank == 0:
        gpu = torch.cuda.get_device_name()
        Path(path).write_text(json.dumps({"ranks": memory.size, "gpu": gpu, "us": times}))


if __name__ == "__main__":
    peer_ranks.run_command(__doc__, time_all, "sampling.json")
