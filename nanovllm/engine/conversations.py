"""Conversations as users give them, and their form for a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.utils.options import as_list, short

Conversation = Sequence[Mapping[str, Any]]

# Arguments of `apply_chat_template` that are set here.
CHAT_ARGUMENTS = {"conversation", "chat_template", "add_generation_prompt", "tokenize",
                  "return_dict", "return_tensors"}  # fmt: skip


def list_conversations(messages: Any) -> list[Any]:
    """The conversations of one call, still to be checked: that of messages, or each of a list."""
    listed = as_list(messages)
    if listed is None:
        raise TypeError(f"messages={short(messages)} is neither a conversation nor a list of them")
    single = any(isinstance(item, Mapping) for item in listed)
    return [listed] if single else listed


def check_messages(messages: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a conversation, each content a text; TypeError or ValueError says why not."""
    listed = as_list(messages)
    if listed is None:
        raise TypeError(f"{name}={short(messages)} is not a list of messages")
    if not listed:
        raise ValueError(f"{name} is empty: it must have at least one message")
    for i, message in enumerate(listed):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"{name}[{i}]={short(message)} is not a dict with a text as its 'role'")
    return [_join_parts(message, f"{name}[{i}]") for i, message in enumerate(listed)]


def _join_parts(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A message with its parts, if it has any, as one text: templates of text models want that."""
    parts = message.get("content")
    if parts is None or isinstance(parts, str):
        return dict(message)
    texts: list[Any] = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in as_list(parts) or [None]
    ]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"{name}['content']={short(parts)} is neither a text nor a list of parts of type 'text'"
        )
    return {**message, "content": "\n".join(texts)}


def template_options(
    chat_template: Any = None, add_generation_prompt: Any = True, chat_template_kwargs: Any = None
) -> dict[str, Any]:
    """Arguments of `apply_chat_template`, as `LLMEngine.chat` takes them.

    Raises TypeError if one is not of its type.
    """
    if chat_template is not None and not isinstance(chat_template, str):
        raise TypeError(f"chat_template={short(chat_template)} is neither None nor a text")
    if not isinstance(add_generation_prompt, bool):
        raise TypeError(f"add_generation_prompt={short(add_generation_prompt)} is no bool")
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        given = short(chat_template_kwargs)
        raise TypeError(f"chat_template_kwargs={given} is neither None nor a dict")
    further = dict(chat_template_kwargs or {})
    if clashes := sorted(CHAT_ARGUMENTS & set(further)):
        raise TypeError(f"chat_template_kwargs must not hold {', '.join(map(repr, clashes))}")
    return {
        "chat_template": chat_template,
        "add_generation_prompt": add_generation_prompt,
        "tokenize": True,
        "return_dict": False,
        **further,
    }
