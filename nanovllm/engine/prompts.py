"""What users may give as prompts: texts, and lists of token ids of any kind of integer."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

Prompt = str | Sequence[int]

# Iterable, but in no order, or not of what they seem to hold.
NO_LISTS = (Mapping, Set, bytes, bytearray, memoryview)


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
