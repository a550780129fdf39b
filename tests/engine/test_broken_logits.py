"""Logits that are not numbers: their request ends in error, and no other one is touched."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from tests.checkpoints import Shape
from tests.engine.cases import GREEDY, OPTIONS, PROMPTS, check_empty, tokens

BROKEN = 13  # a token whose embedding is NaN


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The directory of `tests.engine`, but for one row of the embedding."""
    directory = tmp_path_factory.mktemp("broken")
    Shape(seed=5).write(directory)
    path = directory / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"][BROKEN] = torch.nan
    save_file(weights, path)
    return directory


@pytest.mark.parametrize("sampling", [{}, {"top_k": 5}, {"top_p": 0.5}, {"temperature": 0}])
@pytest.mark.parametrize("options", [{}, {"async_scheduling": False}, {"num_kvcache_blocks": 6}])
def test_only_the_request_with_such_logits_ends_in_error(broken, caplog, sampling, options):
    sound = [[token for token in prompt if token != BROKEN] for prompt in PROMPTS]
    params = SamplingParams(**{"max_tokens": 8, "seed": 3, "ignore_eos": True, **sampling})
    with LLM(str(broken), **OPTIONS, **options) as engine:
        right = tokens(engine.generate(sound, params, use_tqdm=False))
        assert not any(BROKEN in ids for ids in right)
        mixed = [sound[0], [BROKEN, 5], sound[1], [5, BROKEN, 6, 7] * 6, *sound[2:]]
        for _ in range(3):  # blocks that held NaN are used again
            outputs = engine.generate(mixed, params, use_tqdm=False)
            reasons = [output["finish_reason"] for output in outputs]
            assert reasons == ["length", "error", "length", "error", "length", "length"]
            assert [tokens(outputs)[i] for i in (0, 2, 4, 5)] == right
            assert tokens(outputs)[1] == tokens(outputs)[3] == []
        check_empty(engine)
    named = [record.getMessage() for record in caplog.records]
    assert sum("not numbers" in message for message in named) == 6
    assert any("Request 5 " in message for message in named)


def test_a_request_that_breaks_later_keeps_its_tokens(broken, monkeypatch):
    """The first tokens are right, then nothing can be drawn."""
    with LLM(str(broken), **OPTIONS) as engine:
        (right,) = tokens(engine.generate([PROMPTS[0]], GREEDY, use_tqdm=False))
        model = engine.model_runner.model
        compute, calls = model.compute_logits, iter(range(1000))

        def breaking(*args):
            logits = compute(*args)
            return logits.fill_(torch.nan) if next(calls) == 3 else logits

        monkeypatch.setattr(model, "compute_logits", breaking)
        (output,) = engine.generate([PROMPTS[0]], GREEDY, use_tqdm=False)
    assert (output["token_ids"], output["finish_reason"]) == (right[:3], "error")
