"""Warming up: which steps are run, and that they touch nothing but the padding block."""

import dataclasses

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine.block_manager import PADDING_BLOCK
from nanovllm.engine.graph_memory import batch_sizes
from nanovllm.engine.warm_up import MOST_ROWS, SAMPLING, warm_up
from nanovllm.kernels import fused_gemm, paged_prefill, small_gemm
from nanovllm.layers.sampler import SamplingBatch


@pytest.fixture(scope="module")
def llm():
    with LLM(device="cpu", num_kvcache_blocks=6) as engine:
        yield engine


@pytest.fixture
def warmed(llm, monkeypatch):
    """Warms up; returns the rows of every prompt and of every decode step."""

    def run(max_prompt=4096, **options):
        runner = llm.model_runner
        steps, config = runner.step_runner, dataclasses.replace(llm.config, **options)
        prompts, decodes = [], []
        prepare, pad = steps.prepare_prompts, steps.run_padding

        def prepare_prompts(chunks):
            prompts.append([chunk.end - chunk.start for chunk in chunks])
            return prepare(chunks)

        def run_padding(size):
            decodes.append(size)
            return pad(size)

        with monkeypatch.context() as patch:
            patch.setattr(steps, "prepare_prompts", prepare_prompts)
            patch.setattr(steps, "run_padding", run_padding)
            logits = warm_up(steps, config, max_prompt)
        assert logits.shape == (1, runner.model_config.vocab_size)
        return prompts, decodes

    return run


def test_prompts_of_a_ladder_of_lengths_are_run(warmed):
    assert warmed()[0] == [[rows] for rows in batch_sizes(MOST_ROWS)]
    assert warmed(max_prompt=20)[0][-2:] == [[16], [20]]


@pytest.mark.parametrize("num_sms", [16, 78, 132])
@pytest.mark.parametrize("features", [1024, 2048, 3072, 4096])
def test_the_ladder_meets_the_tiles_that_any_step_takes(num_sms, features):
    tiles = features // fused_gemm._FEATURES

    def kernels_of(rows: int) -> set:
        found = {("prefill", paged_prefill._tiling(128, 2, rows))}
        if rows <= small_gemm.MAX_ROWS:
            found.add(("small", 1 << (rows - 1).bit_length()))
        elif rows <= fused_gemm._MAX_ROWS_HEADS:
            found.add(("paired", fused_gemm.pick_tiles(rows, tiles // 2, num_sms)))
            if rows <= fused_gemm._MAX_ROWS_SPLIT:
                found.add(("split", fused_gemm.pick_splits(rows, features, num_sms)))
        return found

    met = set().union(*map(kernels_of, batch_sizes(MOST_ROWS)))
    assert set().union(*map(kernels_of, range(1, 4096))) <= met


def test_all_kinds_of_limits_are_drawn_with():
    """Each combination that the sampler tells apart, so that it launches other kernels."""
    kinds = set()
    for params in SAMPLING:
        batch = SamplingBatch.unpack(
            SamplingBatch.pack([params], [0], [0], [0], 50), torch.device("cpu")
        )
        _, *limits = batch.limits or (None,) * 3
        kinds.add(tuple(limit is not None for limit in limits))
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [(512, [1, 2, 4, 8, 16, 512]), (16, [1, 2, 4, 8, 16]), (3, [1, 2, 3]), (1, [1])],
)
def test_decode_is_run_where_it_is_not_captured(warmed, max_num_seqs, sizes):
    assert warmed(max_prompt=1, max_num_seqs=max_num_seqs)[1] == []
    assert warmed(max_prompt=1, max_num_seqs=max_num_seqs, enforce_eager=True)[1] == sizes


@torch.inference_mode()
def test_only_the_padding_block_is_written(llm, warmed):
    runner = llm.model_runner
    runner.model.kv_cache.zero_()
    warmed(max_prompt=40, enforce_eager=True)
    runner._run_largest_step()
    cache = runner.model.kv_cache
    assert cache[:, :, PADDING_BLOCK].any()
    assert not cache[:, :, PADDING_BLOCK + 1 :].any()
    assert runner.statistics.as_dict()["total_tokens"] == 0
