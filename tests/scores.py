"""What log-probabilities must be, by transformers or by the definition, and how to compare."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from nanovllm import Logprob

TOLERANCE = 1e-4


@torch.inference_mode()
def log_softmax(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[T, vocab]: of what follows each token."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def check_place(place: dict[int, Logprob], token: int, count: int, right: torch.Tensor) -> None:
    """`place` holds `token` and the `count` likeliest ones by `right` [vocab]."""
    assert next(iter(place)) == token
    assert len(place) == count + (place[token].rank > count)
    for i, each in place.items():
        assert abs(each.logprob - right[i].item()) < TOLERANCE
        least, most = (int((right > right[i] + e).sum()) for e in (TOLERANCE, -TOLERANCE))
        assert least < each.rank <= most
    likeliest = sorted((each for each in place.values()), key=lambda each: each.rank)[:count]
    assert [each.rank for each in likeliest] == list(range(1, count + 1))
    values = [each.logprob for each in likeliest]
    assert values == sorted(values, reverse=True)


def check_output(
    model: PreTrainedModel,
    prompt: list[int],
    output: Any,
    logprobs: int | None,
    prompts: int | None,
) -> None:
    """A completion has what was asked for, and as transformers says."""
    ids = prompt + output["token_ids"]
    right = log_softmax(model, ids)
    if logprobs is None:
        assert output["logprobs"] is None
    else:
        after = range(len(prompt), len(ids))
        for i, place in zip(after, output["logprobs"], strict=True):
            check_place(place, ids[i], logprobs, right[i - 1])
    if prompts is None:
        assert output["prompt_logprobs"] is None
    else:
        first, *places = output["prompt_logprobs"]
        assert first is None
        for i, place in zip(range(1, len(prompt)), places, strict=True):
            check_place(place, ids[i], prompts, right[i - 1])
