"""Scores of logits: the definition's, and the same on any number of ranks."""

import pytest
import torch

from nanovllm.kernels.reference_sampling import SAMPLE_TILE
from nanovllm.layers.logprobs import score
from nanovllm.layers.parallel import ParallelGroup, Shard
from tests.checkpoints import prompts
from tests.engine.cases import PIPELINED
from tests.scores import check_process
from tests.thread_ranks import on_ranks, random_logits

ROWS = 12


def score_part(logits: torch.Tensor, tokens: torch.Tensor, count: int, group: ParallelGroup):
    shard = Shard.of_tiles(logits.shape[1], SAMPLE_TILE, group)
    return score(logits[:, shard.span], tokens, count, group, shard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [20, 300, 2 * SAMPLE_TILE, 2 * SAMPLE_TILE + 3])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_scores_are_those_of_the_definition_on_any_number_of_ranks(vocab, count, dtype):
    """Equal logits, of which 16 bits have many, are in the order of their tokens."""
    logits, tokens = random_logits(ROWS, vocab, dtype), torch.randint(vocab, (ROWS,))
    found = score_part(logits, tokens, count, ParallelGroup())
    right = logits.double().log_softmax(1)
    order = logits.float().sort(dim=1, descending=True, stable=True).indices
    for row in (~logits.isnan().any(1)).nonzero()[:, 0].tolist():
        assert found.tokens[row].tolist() == [tokens[row], *order[row, :count]]
        assert found.ranks[row] == 1 + (order[row] == tokens[row]).nonzero()
        if logits[row].max().isfinite():  # else there is no softmax
            torch.testing.assert_close(found.logprobs[row], right[row, found.tokens[row]].float())
    for size in (2, 4):
        for scores in on_ranks(size, lambda group: score_part(logits, tokens, count, group)):
            assert torch.equal(scores.tokens, found.tokens)
            assert torch.equal(scores.ranks, found.ranks)
            torch.testing.assert_close(scores.logprobs, found.logprobs, equal_nan=True)


def test_a_row_that_is_broken_names_tokens_of_the_vocabulary():
    logits = torch.full((1, 300), float("nan"))
    found = score_part(logits, torch.tensor([5]), 3, ParallelGroup())
    assert ((found.tokens >= 0) & (found.tokens < 300)).all()


def test_two_ranks_say_what_transformers_says(tmp_path):
    """With prompts in chunks, of which some steps draw nothing, preemption and micro-batches.

    Both run the same micro-batches, or the collectives of the two would not fit.
    """
    asked = [(None, None), (3, 2), (0, None), (None, 20), (20, 0), (1, 1)]
    options = {
        "device": "cpu", "tensor_parallel_size": 2, "max_model_len": 64, "num_kvcache_blocks": 8,
        "max_num_batched_tokens": 13, **PIPELINED,
    }  # fmt: skip
    given = prompts(4, count=6, longest=40)
    result = check_process(tmp_path, given, asked, options, max_tokens=20)
    assert result["preemptions"] > 0
    assert result["pipelined"] > 3
