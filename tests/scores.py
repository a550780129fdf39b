"""What log-probabilities must be, by transformers or by the definition, and how to compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nanovllm import Logprob
from tests import engine_tasks
from tests.checkpoints import OddVocabShape

Asked = tuple[int | None, int | None]  # logprobs, prompt_logprobs


@torch.inference_mode()
def log_softmax(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[T, vocab]: of what follows each token."""
    return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def check_place(
    place: dict[int, Logprob], token: int, count: int, right: torch.Tensor, tolerance: float
) -> None:
    """`place` holds `token` and the `count` likeliest ones by `right` [vocab]."""
    assert next(iter(place)) == token
    assert len(place) == count + (place[token].rank > count)
    for i, each in place.items():
        assert abs(each.logprob - right[i].item()) < tolerance
        least, most = (int((right > right[i] + e).sum()) for e in (tolerance, -tolerance))
        assert least < each.rank <= most
    likeliest = sorted((each for each in place.values()), key=lambda each: each.rank)[:count]
    assert [each.rank for each in likeliest] == list(range(1, count + 1))
    values = [each.logprob for each in likeliest]
    assert values == sorted(values, reverse=True)


def check_output(
    model: PreTrainedModel, prompt: list[int], output: Any, asked: Asked, tolerance: float = 1e-4
) -> None:
    """A completion has what was asked for, and as transformers says."""
    ids = prompt + output["token_ids"]
    right = log_softmax(model, ids)
    after, within = range(len(prompt), len(ids)), range(1, len(prompt))
    for field, count, numbers in zip(
        ("logprobs", "prompt_logprobs"), asked, (after, within), strict=True
    ):
        places = output[field]
        if count is None:
            assert places is None
            continue
        if field == "prompt_logprobs":
            assert places[0] is None
            places = places[1:]
        for i, place in zip(numbers, places, strict=True):
            check_place(place, ids[i], count, right[i - 1], tolerance)


def check_outputs(
    model: PreTrainedModel,
    given: Sequence[list[int]],
    outputs: Sequence[Any],
    asked: Sequence[Asked],
    tolerance: float = 1e-4,
) -> None:
    """The same of several; `given` are their prompts."""
    for prompt, output, counts in zip(given, outputs, asked, strict=True):
        check_output(model, prompt, output, counts, tolerance)


def check_process(
    directory: Path,
    given: list[list[int]],
    asked: Sequence[Asked],
    options: dict[str, Any],
    tolerance: float = 1e-4,
    **fields: Any,
) -> dict[str, Any]:
    """Checks completions of an engine in a process of its own; returns its whole result.

    `options` are those of `LLM`, `fields` of all `SamplingParams`; each request has its own seed.
    """
    model = OddVocabShape(seed=6).write(directory / "model")
    sampling = [
        {"seed": i, "logprobs": a, "prompt_logprobs": b, **fields} for i, (a, b) in enumerate(asked)
    ]
    options = {"model": str(directory / "model"), "kvcache_block_size": 16, **options}
    task = {"options": options, "prompts": given, "sampling": sampling}
    (result,) = engine_tasks.run_elsewhere(directory, [task])
    for output in result["outputs"]:
        for field in ("logprobs", "prompt_logprobs"):
            output[field] = output[field] and [_from_json(place) for place in output[field]]
    check_outputs(model, given, result["outputs"], asked, tolerance)
    return result


def _from_json(place: dict[str, list[Any]] | None) -> dict[int, Logprob] | None:
    return place and {int(token): Logprob(*each) for token, each in place.items()}
