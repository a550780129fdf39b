"""What an engine with default options takes of a real GPU, and that it stays so.

Needs a GPU that nothing else uses. Run: `python -m pytest tests/gpu/test_memory.py`
"""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm import LLM
from nanovllm.bench.shapes import shape_directory
from nanovllm.config import Config
from tests import scripts

SHAPE = "0.6B"
VOCAB = 151936
BATCH = 64
DECODE_STEPS = 2000
WARM_UP_STEPS = 200
RSS_LIMIT = 4 << 20


def free_memory() -> None:
    """Gives back what earlier tests have left."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def used_memory() -> int:
    """Bytes of the device in use, whoever uses them."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCAB) for _ in range(length)]


@pytest.fixture(scope="class")
def engine() -> Iterator[LLM]:
    """All options that decide on memory are the defaults."""
    free_memory()
    with (
        shape_directory(SHAPE) as directory,
        LLM(directory, device="cuda", load_format="dummy") as engine,
    ):
        yield engine
    del engine
    free_memory()


@dataclass(frozen=True)
class Memory:
    """Bytes, with no request in the engine and nothing under way on the device."""

    allocated: int
    reserved: int
    device: int
    host: int

    @classmethod
    def now(cls) -> Memory:
        gc.collect()
        torch.cuda.synchronize()
        return cls(
            torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), used_memory(), host_rss()
        )


def host_rss() -> int:
    """Bytes of this process that are in the host's memory."""
    resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(resident) * os.sysconf("SC_PAGE_SIZE")


class TestRunningEngine:
    def test_memory_is_filled_as_far_as_allowed(self, engine):
        """The share counts everything on the device, also what was there before the engine."""
        _, total = torch.cuda.mem_get_info()
        wanted = Config.gpu_memory_utilization * total
        assert used_memory() == pytest.approx(wanted, rel=0.02), "after start-up"
        # The steps that need most: as many tokens as allowed, then as many rows to draw from.
        rng = random.Random(0)
        length = Config.max_num_batched_tokens // Config.max_num_seqs
        prompts = [random_prompt(rng, length) for _ in range(Config.max_num_seqs)]
        engine.generate(prompts, temperature=0.8, top_p=0.9, max_tokens=4, use_tqdm=False)
        assert used_memory() == pytest.approx(wanted, rel=0.02), "after the largest steps"

    def test_nothing_grows_in_2000_decode_steps(self, engine):
        """Requests come and go in rounds of equal lengths and different tokens.

        Equal, as the allocator may need more for lengths that it has not seen before; between two
        rounds there is no request, so that the same must be in use each time.
        """
        while decode_steps(engine) < WARM_UP_STEPS:
            run_round(engine)
        begin, before = decode_steps(engine), Memory.now()
        host = [before.host]
        while decode_steps(engine) < begin + DECODE_STEPS:
            run_round(engine)
            after = Memory.now()
            steps = decode_steps(engine) - begin
            assert after.allocated <= before.allocated, f"torch allocates more after {steps} steps"
            assert after.reserved == before.reserved, f"torch reserves more after {steps} steps"
            assert after.device <= before.device, f"the device holds more after {steps} steps"
            host.append(after.host)
        # The least of each half: the host's allocators keep some rounds' memory and not others'.
        half = len(host) // 2
        grown = min(host[half:]) - min(host[:half])
        assert grown < RSS_LIMIT, f"the process has grown by {grown / 2**20:.1f} MiB"


def decode_steps(engine: LLM) -> int:
    """Decode steps so far."""
    steps: Any = engine.model_runner.get_pipeline_statistics()["steps"]
    return sum(steps.values())


def run_round(engine: LLM) -> None:
    """Three requests a seat: whenever one finishes, the next one arrives; then runs them all out.

    About 220 decode steps, most of them of `BATCH` sequences.
    """
    lengths, tokens = random.Random(1), random.Random()
    waiting = [(lengths.randint(1, 600), lengths.randint(20, 90)) for _ in range(3 * BATCH)]
    running = 0
    while waiting or not engine.is_finished():
        while waiting and running < BATCH:
            prompt_len, max_tokens = waiting.pop()
            params = {"temperature": 0.8, "ignore_eos": True, "max_tokens": max_tokens}
            engine.add_request(random_prompt(tokens, prompt_len), **params)
            running += 1
        running -= len(engine.step())


# A process that starts an engine and generates, first once, then with other lengths and batches.
# Prints the files in Triton's cache after the start, after the first time and at the end.
START = """
import json, os, random, sys
from pathlib import Path
from nanovllm import LLM, SamplingParams
from nanovllm.bench.shapes import shape_directory

SAMPLING = [dict(temperature=0), dict(temperature=0.8), dict(temperature=0.8, top_k=20),
            dict(temperature=0.8, top_p=0.9)]

def files():
    root = Path(os.environ["TRITON_CACHE_DIR"])
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

def generate(lengths):
    prompts = [[random.randrange(151936) for _ in range(length)] for length in lengths]
    params = [SamplingParams(ignore_eos=True, max_tokens=12, **SAMPLING[i % 4])
              for i in range(len(prompts))]
    engine.generate(prompts, params, use_tqdm=False)

with shape_directory(sys.argv[1]) as directory:
    engine = LLM(directory, device="cuda", load_format="dummy")
    started = files()
    with engine:
        generate([5, 1, 300, 3000])
        first = files()
        for lengths in ([1], [3], [8], [16] * 16, [4096 - 12], [700] * 40,
                        [random.randint(1, 900) for _ in range(77)]):
            generate(lengths)
        print(json.dumps({"started": started, "first": first, "end": files()}))
"""


@pytest.mark.timeout(600)
class TestStartUp:
    @pytest.fixture(scope="class")
    def processes(self, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
        """Two, one after the other, with a kernel cache of their own that is empty at first."""
        free_memory()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
            said = [scripts.output_of("-c", START, SHAPE, timeout=280) for _ in range(2)]
        return [json.loads(lines[-1]) for lines in said]

    def test_first_requests_leave_no_kernel_to_compile(self, processes):
        cold = processes[0]
        assert any(name.endswith(".cubin") for name in cold["first"])
        assert set(cold["end"]) - set(cold["first"]) == set()

    def test_no_request_compiles_a_kernel(self, processes):
        cold = processes[0]
        assert set(cold["end"]) - set(cold["started"]) == set()

    def test_a_second_process_compiles_nothing(self, processes):
        cold, warm = processes
        assert set(warm["end"]) - set(cold["end"]) == set()
