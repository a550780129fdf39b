"""What users get: completions, and what is new of them while they come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypedDict

from tqdm import tqdm

from nanovllm.engine.sequence import Sequence
from nanovllm.logprobs import Logprob

Logprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]


class Completion(TypedDict):
    """A sample of what follows a prompt.

    `finish_reason`: "stop", "length", "abort", or "error" if logits were not numbers, no token
    was allowed, or the tokens have no text. `stop_reason`: which of `stop` or `stop_token_ids`
    ended it; None: something else.
    `index` is the place of its prompt in the call, `sample` runs from 0 to n - 1. `token_ids` has
    all tokens, also those of which `text` lacks the text, because they stopped it. Times are those
    of `time.perf_counter()`, in seconds; there is no `first_token_time` without a token.
    `logprobs`: a dict by token id for each of `token_ids`. `prompt_logprobs`: one for each token of
    the prompt, None for the first, which nothing precedes; fewer if it was aborted before they were
    known. Both None if not asked for, or without text.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: str | int | None
    logprobs: Logprobs | None
    prompt_logprobs: PromptLogprobs | None
    index: int
    sample: int
    prompt_token_ids: list[int]
    queued_time: float
    first_token_time: float | None
    end_time: float


class RequestOutput(Completion):
    """What `step` returns for a request that has finished."""

    request_id: int


class Delta(TypedDict):
    """What is new of a completion; `finish_reason` is None until the last one."""

    index: int
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str | None


class DeltaMaker:
    """Gives a request's text in parts, which make the completion's text together."""

    def __init__(self, seq: Sequence) -> None:
        self.seq = seq
        self.characters = self.tokens = 0

    def next(self) -> Delta | None:
        """The text that is new and will stay as it is; None if there is none, or it has ended."""
        seq = self.seq
        if seq.finish_reason is not None or seq.detokenizer is None:
            return None
        text, end = seq.detokenizer.safe_text()
        if len(text) == self.characters:
            return None
        return self._make(text, seq.token_ids[seq.prompt_len : end], None)

    def last(self, completion: Completion) -> Delta:
        """The rest of it."""
        return self._make(completion["text"], completion["token_ids"], completion["finish_reason"])

    def _make(self, text: str, token_ids: list[int], finish_reason: str | None) -> Delta:
        characters, tokens = self.characters, self.tokens
        self.characters, self.tokens = len(text), len(token_ids)
        return Delta(
            index=self.seq.index,
            sample=self.seq.sample,
            text=text[characters:],
            token_ids=token_ids[tokens:],
            finish_reason=finish_reason,
        )


@contextmanager
def progress_bar(count: int, show: bool) -> Iterator[Callable[[Completion], None]]:
    """A bar for `count` completions; gives what to call with each."""
    tokens, start = 0, time.perf_counter()
    with tqdm(total=count, desc="Generating", disable=not show) as bar:

        def advance(completion: Completion) -> None:
            nonlocal tokens
            tokens += len(completion["token_ids"])
            rate = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update()

        yield advance
