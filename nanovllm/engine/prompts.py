"""What users give and get: prompts, which are texts or lists of token ids, and texts."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from nanovllm.utils.locks import exclusive

Prompt = str | Sequence[int]

# Iterable, but in no order, or not of what they seem to hold.
NO_LISTS = (Mapping, Set, bytes, bytearray, memoryview)


class TextProcessor:
    """Turns prompts into token ids that an engine can run, and token ids into text.

    Args:
        model: as configured, for errors.
        tokenizer: None: prompts are token ids, and texts are empty.
        vocab_size: token ids are below it.
        limits: most tokens of a prompt, by what sets the limit.
    """

    def __init__(
        self, model: str, tokenizer: Any | None, vocab_size: int, limits: dict[str, int]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.limits = limits
        self.lock = threading.RLock()  # a tokenizer is for one thread at a time

    def encode(self, prompt: Prompt, name: str) -> list[int]:
        """The token ids of `prompt`, which errors call `name`.

        Raises:
            TypeError, ValueError: it is no prompt, or none that fits.
        """
        token_ids = self._tokenize(prompt, name)
        if not token_ids:
            raise ValueError(f"{name} is empty: it must have at least one token")
        for limit, tokens in self.limits.items():
            if len(token_ids) > tokens:
                raise ValueError(f"{name} has {len(token_ids)} tokens, but {limit} allows {tokens}")
        if not 0 <= min(token_ids) <= max(token_ids) < self.vocab_size:
            bad = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise ValueError(
                f"{name} holds token id {bad}, which is outside the vocabulary: ids are from 0 "
                f"to {self.vocab_size - 1}"
            )
        return token_ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of `token_ids` without special tokens; raises whatever the tokenizer does."""
        if self.tokenizer is None:
            return ""
        decode = self.tokenizer.decode
        return str(exclusive(self.lock, decode, token_ids, skip_special_tokens=True))

    def _tokenize(self, prompt: Prompt, name: str) -> list[int]:
        if not isinstance(prompt, str):
            return list_token_ids(prompt, name)
        if self.tokenizer is None:
            raise ValueError(
                f"{name} is a text, but model={self.model!r} has no tokenizer: give token ids"
            )
        try:
            return list(exclusive(self.lock, self.tokenizer.encode, prompt))
        except Exception as error:  # of the tokenizer, which comes with the checkpoint
            raise ValueError(f"{name}={prompt!r:.80} cannot be encoded: {error!r}") from error


def list_prompts(prompts: Any) -> list[Prompt]:
    """The prompts of one call, whose elements are still to be checked.

    Raises:
        TypeError: it is neither a text nor a list.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Iterable) and not isinstance(prompts, NO_LISTS):
        return list(prompts)
    raise TypeError(f"prompts={prompts!r:.80} is neither a text nor a list of prompts")


def list_token_ids(prompt: Any, name: str) -> list[int]:
    """The ids in `prompt`: any iterable of integers, also of NumPy's and torch's.

    Raises:
        TypeError: it is no such list, which `name` is to say.
    """
    try:
        if isinstance(prompt, Iterable) and not isinstance(prompt, (str, *NO_LISTS)):
            ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
            # A call per token would keep the GPU waiting for a long prompt.
            return ids if set(map(type, ids)) == {int} else [_token_id(value) for value in ids]
    except TypeError:
        pass  # the error below says what is wrong
    raise TypeError(f"{name}={prompt!r:.80} is neither a text nor a list of token ids")


def _token_id(value: Any) -> int:
    # Arrays and tensors of one element would pass for integers, and so would their booleans.
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, bool):
        raise TypeError("True and False are no token ids")
    return operator.index(plain)
