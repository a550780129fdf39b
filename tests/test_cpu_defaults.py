"""What an engine on a CPU takes of the machine: memory and threads, as its requests need them."""

import os
from pathlib import Path

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine import kv_cache
from nanovllm.layers.attention import HeadShape
from nanovllm.utils.device import GIB, single_thread


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_a_kv_cache_takes_memory_only_where_it_is_written():
    before, heads = resident_bytes(), HeadShape(4, 4, 64)
    cache = kv_cache.allocate(2, 2000, 256, heads, torch.bfloat16, torch.device("cpu"))
    assert cache.nbytes > GIB // 2
    cache[:, :, 1] = 1
    assert resident_bytes() - before < GIB // 16
    assert cache[1, 1, 1].all()
    assert not cache[1, 1, 2].any()


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_request_after_request_writes_the_same_blocks(enable_prefix_caching):
    with LLM(device="cpu", enable_prefix_caching=enable_prefix_caching) as llm:
        for i in range(5):
            llm.generate([[i + 2] * 10, [i + 3] * 300], max_tokens=3, use_tqdm=False)
        written = llm.model_runner.model.kv_cache[0, 0, 1:].flatten(1).any(1).sum()
    # Three at a time; with a prefix cache, the full block of each long prompt is kept.
    assert written == (7 if enable_prefix_caching else 3)


@pytest.mark.parametrize("count", [2, 100])
def test_as_many_run_at_a_time_as_may(count):
    with LLM(device="cpu", max_num_seqs=count, max_model_len=16, kvcache_block_size=16) as llm:
        for i in range(count):
            llm.add_request([i + 2], max_tokens=3, ignore_eos=True)
        llm.step()
        assert len(llm.scheduler.running) == count


def test_a_small_model_runs_on_one_thread_and_leaves_the_callers_alone():
    found, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with LLM(device="cpu") as llm:
            llm.model_runner.watch = lambda *moment: found.append(torch.get_num_threads())
            llm.generate("Once", max_tokens=2, use_tqdm=False)
        assert set(found) == {1, 2}  # inside, and when the tokens are there
        with pytest.raises(ZeroDivisionError), single_thread():
            found.append(1 / 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
