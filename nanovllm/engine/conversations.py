"""Conversations as users give them, and their form for a chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanovllm.utils.options import as_list, short

Conversation = Sequence[Mapping[str, Any]]

# Arguments of `apply_chat_template` that are set here, or are for the tokenizer: a prompt must not
# be cut or filled up.
CHAT_ARGUMENTS = {
    "conversation", "chat_template", "add_generation_prompt", "tokenize", "return_dict",
    "return_tensors", "return_assistant_tokens_mask", "sanitize_control_tokens", "padding",
    "truncation", "max_length", "tokenizer_kwargs",
}  # fmt: skip


def list_conversations(messages: Any) -> list[Any]:
    """The conversations of one call, still to be checked: that of messages, or each of a list."""
    listed = as_list(messages)
    if listed is None:
        raise TypeError(f"messages={short(messages)} is neither a conversation nor a list of them")
    single = any(isinstance(item, Mapping) for item in listed)
    return [listed] if single else listed


def check_messages(messages: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a conversation, as templates of text models want them.

    TypeError or ValueError says why they are none.
    """
    listed = as_list(messages)
    if listed is None:
        raise TypeError(f"{name}={short(messages)} is not a list of messages")
    if not listed:
        raise ValueError(f"{name} is empty: it must have at least one message")
    for i, message in enumerate(listed):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(f"{name}[{i}]={short(message)} is not a dict with a text as its 'role'")
    return [_plain(message, f"{name}[{i}]") for i, message in enumerate(listed)]


def _plain(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A message whose content is one text, and the arguments of its tool calls are objects."""
    # Templates would write None as a word, and take an empty list of calls for one with some.
    given = {key: value for key, value in message.items() if value is not None}
    calls = as_list(given.pop("tool_calls", ()))
    if calls is None:
        raise TypeError(f"{name}['tool_calls']={short(message['tool_calls'])} is no list")
    if calls:
        where = f"{name}['tool_calls']"
        given["tool_calls"] = [_parse(call, f"{where}[{i}]") for i, call in enumerate(calls)]
    parts = given.get("content")
    if parts is None or isinstance(parts, str):
        return given
    texts: list[Any] = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in as_list(parts) or [None]
    ]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(
            f"{name}['content']={short(parts)} is neither a text nor a list of parts of type 'text'"
        )
    return {**given, "content": "\n".join(texts)}


def _parse(call: Any, name: str) -> Any:
    """A tool call without OpenAI's JSON text as its arguments: templates would quote it again."""
    function = call.get("function") if isinstance(call, Mapping) else None
    text = function.get("arguments") if isinstance(function, Mapping) else None
    if function is None or not isinstance(text, str):
        return call
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{name}['function']['arguments']={short(text)} is no JSON: {error}"
        ) from None
    return {**call, "function": {**function, "arguments": arguments}}


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
