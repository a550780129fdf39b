"""What users give and get: prompts (texts, token ids, conversations), and texts."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypedDict

from nanovllm.engine.conversations import check_messages, template_options
from nanovllm.utils.json_files import naming
from nanovllm.utils.locks import exclusive
from nanovllm.utils.options import as_list, short, token_ids


class TextPrompt(TypedDict):
    """A text, as vLLM's users may give it."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids, as vLLM's users may give them."""

    prompt_token_ids: Sequence[int]


class UndecodableError(ValueError):
    """The tokenizer, which comes with the checkpoint, fails for some tokens."""


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
# Not `Prompt | Sequence[Prompt]`: a list of integers is no list of prompts, and beside a second
# kind of sequence type checkers do not infer the type of `["One", [2, 3]]`.
Prompts = str | TextPrompt | TokensPrompt | Sequence[Prompt]


@dataclass
class TextProcessor:
    """Turns prompts into token ids that an engine can run, and token ids into text.

    Without a tokenizer prompts are token ids, and texts are empty.
    """

    model: str
    tokenizer: Any | None
    vocab_size: int
    limits: dict[str, int]  # the most tokens of a prompt, by what sets the limit

    def __post_init__(self) -> None:
        self.max_len = min(self.limits.values())
        # Texts are encoded by one thread at a time: an encoding may set how texts are truncated.
        self.lock = threading.RLock()
        self.token_texts: dict[int, str] = {}
        self.special_ids: frozenset[int] = frozenset()
        if self.tokenizer is not None:
            added = self.tokenizer.added_tokens_decoder
            others = (token for token in added if added[token].special)
            self.special_ids = frozenset([*self.tokenizer.all_special_ids, *others])

    def encode(self, prompt: Prompt, name: str) -> list[int]:
        """The token ids of `prompt`; TypeError or ValueError names it `name` if it cannot run."""
        return self._check(self._tokenize(prompt, name), name)

    def encode_chat(self, messages: Any, name: str, **template: Any) -> list[int]:
        """The token ids of a conversation, by a template with the arguments of `template_options`.

        Each message has a "role", and its "content" is a text or a list of parts of the form
        `{"type": "text", "text": ...}`. Arguments of tool calls are objects, or JSON texts as in
        OpenAI's format. TypeError or ValueError names what is wrong.
        """
        conversation, options = check_messages(messages, name), template_options(**template)
        if self.tokenizer is None:
            raise ValueError(
                f"model={self.model!r} has no tokenizer, and so no chat template: use generate "
                "with token ids"
            )
        if options["chat_template"] is None and not self.tokenizer.chat_template:
            raise ValueError(
                f"model={self.model!r} has no chat template, neither a chat_template.jinja nor a "
                "chat_template in tokenizer_config.json: give chat_template=..., or use generate"
            )
        apply = partial(self.tokenizer.apply_chat_template, conversation, **options)
        with naming(f"{name} does not fit the chat template", ValueError):
            # A lone surrogate anywhere: tokenizers do not say that it is what they refuse.
            json.dumps(conversation, ensure_ascii=False, skipkeys=True, default=str).encode()
            ids = exclusive(self.lock, apply)
        return self._check(list(ids), name)

    def _check(self, ids: list[int], name: str) -> list[int]:
        """The same token ids, if the engine can run them."""
        if not ids:
            raise ValueError(f"{name} is empty: it must have at least one token")
        for limit, tokens in self.limits.items():
            if len(ids) > tokens:
                raise ValueError(f"{name} has {len(ids)} tokens, but {limit} allows {tokens}")
        for extreme in (min(ids), max(ids)):
            if not 0 <= extreme < self.vocab_size:
                raise ValueError(
                    f"{name} holds token id {short(extreme)}, which is outside the vocabulary: "
                    f"ids are from 0 to {self.vocab_size - 1}"
                )
        return ids

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of `token_ids`; raises UndecodableError if the tokenizer fails.

        NOTE: takes no lock, as steps call it: a signal handler or destructor in a thread that
        encodes may wait for a step.
        """
        if self.tokenizer is None:
            return ""
        options = {
            "skip_special_tokens": skip_special_tokens,
            # It changes spaces of the text so far when a comma follows.
            "clean_up_tokenization_spaces": False,
        }
        with naming("its text cannot be decoded", UndecodableError):
            return str(self.tokenizer.decode(token_ids, **options))

    def token_text(self, token: int) -> str | None:
        """The text of one token, whatever its kind; without a tokenizer None.

        Raises UndecodableError if the tokenizer fails.
        """
        if self.tokenizer is None:
            return None
        if token not in self.token_texts:
            self.token_texts[token] = self.decode([token], skip_special_tokens=False)
        return self.token_texts[token]

    def _tokenize(self, prompt: Prompt, name: str) -> list[int]:
        content = _unwrap(prompt, name) if isinstance(prompt, Mapping) else prompt
        if not isinstance(content, str):
            ids = token_ids(content)
            if ids is None:
                raise TypeError(f"{name}={short(prompt)} is neither a text nor a list of token ids")
            return ids
        if self.tokenizer is None:
            raise ValueError(
                f"{name} is a text, but model={self.model!r} has no tokenizer: give token ids"
            )
        with naming(f"{name}={short(prompt)} cannot be encoded", ValueError):
            content.encode()  # a lone surrogate: see above
            # The engine says itself what is too long.
            encode = partial(self.tokenizer.encode, content, verbose=False)
            return list(exclusive(self.lock, encode))


def name_prompts(prompts: Any) -> dict[str, Prompt]:
    """The prompts of one call by their names, unchecked; TypeError: neither a prompt nor a list."""
    single = isinstance(prompts, (str, Mapping))
    listed: list[Any] | None = [prompts] if single else as_list(prompts)
    if listed is None:
        raise TypeError(f"prompts={short(prompts)} is neither a text nor a list of prompts")
    return {f"prompts[{i}]": prompt for i, prompt in enumerate(listed)}


def _unwrap(prompt: Mapping[str, Any], name: str) -> Any:
    """The text or the token ids in a dict."""
    ((key, value),) = prompt.items() if len(prompt) == 1 else [(None, None)]
    if (key == "prompt" and isinstance(value, str)) or (
        key == "prompt_token_ids" and not isinstance(value, str)
    ):
        return value
    raise TypeError(
        f"{name}={short(prompt)} is not allowed: a dict must hold either 'prompt', a text, or "
        "'prompt_token_ids', a list of token ids"
    )
