"""What a request's changes of its logits mean: transformers' processors, and OpenAI's formula."""

import random
from collections.abc import Collection
from typing import Any

import torch
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nanovllm import SamplingParams


def change(
    logits: torch.Tensor,
    params: SamplingParams,
    prompt: list[int],
    generated: list[int],
    end_ids: Collection[int] = (),
) -> torch.Tensor:
    """The logits [V] that temperature divides, in float32."""
    scores, ids = logits.float()[None], torch.tensor([prompt + generated])
    processors: list[Any] = []
    if params.logit_bias:
        bias = {(token,): value for token, value in dict(params.logit_bias).items()}
        processors.append(SequenceBiasLogitsProcessor(bias))
    if params.min_tokens and end_ids:
        processors.append(
            MinNewTokensLengthLogitsProcessor(len(prompt), params.min_tokens, list(end_ids))
        )
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    for processor in processors:
        scores = processor(ids, scores)
    (changed,) = scores.clone()
    for token in set(generated):
        changed[token] -= params.frequency_penalty * generated.count(token)
        changed[token] -= params.presence_penalty
    return changed


def distribution(changed: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The probability of each token, for a temperature above 0."""
    scores, ids = changed.double()[None] / params.temperature, torch.tensor([[0]])
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(ids, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(ids, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(ids, scores)
    return scores[0].softmax(0)


def check_frequencies(drawn: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Tokens are drawn about as often as they should be, and never if they should not be."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected, freedom = probabilities[possible] * len(drawn), int(possible.sum()) - 1
    chi_square = ((counts[possible] - expected) ** 2 / expected).sum().item()
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5 + 4 * (freedom > 0)


class CloseCallError(Exception):
    """Two tokens are so much alike that the last bits of a sum decide."""


@torch.inference_mode()
def greedy(
    model: PreTrainedModel,
    prompt: list[int],
    params: SamplingParams,
    eos_ids: Collection[int],
    least_lead: float = 0.0,
) -> list[int]:
    """What a request generates, one token at a time and without a cache.

    Raises:
        CloseCallError: a token has less than `least_lead` more than the next best.
    """
    ends = {*params.stop_token_ids, *eos_ids}
    stops = {*params.stop_token_ids} if params.ignore_eos else ends
    generated: list[int] = []
    while len(generated) < params.max_tokens and not stops.intersection(generated[-1:]):
        logits = model(torch.tensor([prompt + generated])).logits[0, -1]
        changed = change(logits, params, prompt, generated, ends)
        best, next_best = changed.topk(2).values
        if best - next_best < least_lead:
            raise CloseCallError
        generated.append(int(changed.argmax()))
    return generated


def random_changes(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Options that change logits, about half of them."""
    options = {
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.choice([0.5, 1.1, 1.7]),
        "min_p": rng.choice([0.02, 0.3, 1.0]),
        "min_tokens": rng.randint(1, 9),
        "logit_bias": {
            rng.randrange(vocab): rng.choice([-float("inf"), -100, -1.5, 2, 8])
            for _ in range(rng.randint(1, 9))
        },
    }
    return {name: value for name, value in options.items() if rng.random() < 0.5}
