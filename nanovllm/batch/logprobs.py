"""Log-probabilities in batch files: OpenAI's fields of a body, and their form in an answer."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from nanovllm.logprobs import Logprob
from nanovllm.sampling_params import LOGPROBS
from nanovllm.utils.options import BOOLEAN, check_value, short

# What OpenAI says of a token that is next to impossible; JSON knows no infinity.
LOWEST = -9999.0

Places = list[dict[int, Logprob]]


def take_chat_fields(fields: dict[str, Any]) -> None:
    """Makes the one field of `SamplingParams` of a chat's two; ValueError if they are not right."""
    wanted, count = fields.pop("logprobs", False), fields.pop("top_logprobs", None)
    check_value("logprobs", wanted, BOOLEAN)
    if count and not wanted:  # clients may send OpenAI's defaults, False and 0
        raise ValueError(f"top_logprobs={short(count)} is not allowed without logprobs=True")
    count = check_value("top_logprobs", count, LOGPROBS)
    if wanted:
        fields["logprobs"] = count or 0


def chat_form(token_ids: list[int], places: Places, count: int) -> dict[str, Any]:
    """The `logprobs` of a chat's choice, with the `count` likeliest tokens of each place."""
    content = []
    for token, place in zip(token_ids, places, strict=True):
        entries = {
            each.rank: {"token": text, "logprob": _finite(each), "bytes": list(text.encode())}
            for text, each in _texts(place)
        }
        likeliest = [entries[rank] for rank in sorted(entries) if rank <= count]
        content.append({**entries[place[token].rank], "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def text_form(token_ids: list[int], places: Places) -> dict[str, Any]:
    """The `logprobs` of a completion's choice."""
    texts = [_text(token, place[token]) for token, place in zip(token_ids, places, strict=True)]
    return {
        "tokens": texts,
        "token_logprobs": [_finite(place[t]) for t, place in zip(token_ids, places, strict=True)],
        # Of tokens with the same text the likeliest.
        "top_logprobs": [{t: _finite(each) for t, each in _texts(place)[::-1]} for place in places],
        "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
    }


def prompt_form(places: list[dict[int, Logprob] | None]) -> list[dict[int, Any] | None]:
    """What vLLM adds to a choice as `prompt_logprobs`."""
    return [
        place and {i: each._replace(logprob=_finite(each))._asdict() for i, each in place.items()}
        for place in places
    ]


def _texts(place: dict[int, Logprob]) -> list[tuple[str, Logprob]]:
    return [(_text(token, each), each) for token, each in place.items()]


def _text(token: int, logprob: Logprob) -> str:
    """Without a tokenizer, what vLLM writes."""
    text = logprob.decoded_token
    return f"token_id:{token}" if text is None else text


def _finite(logprob: Logprob) -> float:
    return max(LOWEST, logprob.logprob)
