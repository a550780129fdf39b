"""Warming up: which steps are run, and that they touch nothing but the padding block."""

from __future__ import annotations

import pytest
import torch

from nanovllm import LLM
from nanovllm.engine.block_manager import PADDING_BLOCK
from nanovllm.engine.warm_up import warm_up
from nanovllm.layers.sampler import SamplingBatch
from nanovllm.tiny import CHECKPOINT_DIR

LENGTHS = [1, 2, 4, 8, 16, 32, 64]


class FakeEngine:
    """Notes the steps that it is asked for."""

    def __init__(self):
        self.prefills, self.decodes, self.draws = [], [], []

    def prefill(self, sizes):
        self.prefills.append(sizes)
        return torch.zeros(len(sizes), 50)

    def draw(self, logits, params):
        assert len(logits) == len(params)
        self.draws += params

    def warm_up(self, *, draws=True, eager=False, max_num_seqs=512, max_num_tokens=4096):
        warm_up(
            self.prefill,
            LENGTHS,
            self.draw if draws else None,
            self.decodes.append if eager else None,
            max_num_seqs,
            max_num_tokens,
        )
        return self


def test_every_length_is_prefilled_once():
    assert FakeEngine().warm_up().prefills == [[length] for length in LENGTHS]


def test_no_step_is_longer_than_allowed():
    assert FakeEngine().warm_up(max_num_tokens=20).prefills[-2:] == [[16], [20]]


def test_all_kinds_of_limits_are_drawn_with():
    """Each combination that the sampler tells apart, so that it launches other kernels."""
    kinds = set()
    for params in FakeEngine().warm_up().draws:
        batch = SamplingBatch.of([params], [0], [0], [0], 50, torch.device("cpu"))
        kinds.add((batch.top_k is not None, batch.top_p is not None))
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}


def test_ranks_run_the_same_steps_whether_they_draw_or_not():
    first, other = FakeEngine().warm_up(eager=True), FakeEngine().warm_up(eager=True, draws=False)
    assert (first.prefills, first.decodes) == (other.prefills, other.decodes)
    assert other.draws == []


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [(512, [1, 2, 4, 8, 16, 512]), (16, [1, 2, 4, 8, 16]), (3, [1, 2, 3]), (1, [1])],
)
def test_decode_is_run_where_it_is_not_captured(max_num_seqs, sizes):
    assert FakeEngine().warm_up(max_num_seqs=max_num_seqs).decodes == []
    assert FakeEngine().warm_up(max_num_seqs=max_num_seqs, eager=True).decodes == sizes


@torch.inference_mode()
def test_only_the_padding_block_is_written():
    with LLM(str(CHECKPOINT_DIR), device="cpu", num_kvcache_blocks=6) as engine:
        runner = engine.model_runner
        logits = runner._prefill_padding([5, 1, 40])
        assert logits.shape == (3, runner.model_config.vocab_size)
        assert runner.step_runner.run_padding(3).shape == logits.shape
        for layer in runner.model.model.layers:
            for cache in (layer.self_attn.k_cache, layer.self_attn.v_cache):
                assert cache[PADDING_BLOCK].any()
                cache[PADDING_BLOCK] = 0
                assert not cache.any()
        assert runner.statistics.as_dict()["total_tokens"] == 0
