"""The lines of batch files, in OpenAI's format: requests, and the lines that answer them.

    {"custom_id": "a", "method": "POST", "url": "/v1/completions",
     "body": {"prompt": "Once upon a time", "max_tokens": 20}}

A body for /v1/chat/completions has `messages` in the place of `prompt`. The other fields of a body
are those of `SamplingParams`. Chats also have `chat_template_kwargs` and `add_generation_prompt`,
and OpenAI's `logprobs` (true or false) and `top_logprobs`.
"""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from nanovllm.batch.logprobs import chat_form, prompt_form, take_chat_fields, text_form
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import Completion
from nanovllm.sampling_params import SamplingOptions, SamplingParams
from nanovllm.utils.options import BOOLEAN, Rule, check_value, choice, integer, short

Key = str | int
"""What identifies a request: its custom_id, or where it has none, the number of its line."""

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT_FIELDS = {COMPLETIONS: "prompt", CHAT: "messages"}
# Of a line, beside its custom_id.
FIELDS = {
    "method": choice("POST"),
    "url": choice(*PROMPT_FIELDS),
    "body": Rule("a JSON object", lambda value: isinstance(value, dict)),
}
CHAT_FIELDS = ("add_generation_prompt", "chat_template_kwargs")
MOST_LEVELS = 100
# Choices of one line; OpenAI's limit.
CHOICES = integer(1, 128)
# Fields that change nothing. The model is that of the command, whatever the line says.
IGNORED = (
    "model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
)  # fmt: skip
# Of these null says that there is no limit; of all others, that the field is not given.
LIMITS = {"max_tokens", "max_completion_tokens"}
# What OpenAI's clients may send along, and the values with which it changes nothing.
FIXED = {
    "best_of": choice(1),
    "stream": choice(False),
    "echo": choice(False),
    "suffix": choice(""),
    "tools": choice([]),
    "tool_choice": choice("none", "auto"),
    "parallel_tool_calls": BOOLEAN,
    "modalities": choice(["text"]),
}


@dataclass(frozen=True)
class Line:
    """A line of the input; `problem` says why it asks for nothing, or is empty."""

    number: int
    custom_id: str | None = None
    url: str = ""
    body: Mapping[str, Any] | None = None
    problem: str = ""

    @property
    def key(self) -> Key:
        return self.number if self.custom_id is None else self.custom_id


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a file that are not blank, whether they ask for something or not."""
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if number == 1:
                text = text.removeprefix(codecs.BOM_UTF8)
            if text.strip():
                yield parse(number, text)


def parse(number: int, text: bytes) -> Line:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Line(number, problem=f"the line is no JSON: {error}")
    if not isinstance(fields, dict):
        return Line(number, problem="the line is no JSON object")
    # Before its id counts: how deep Python can go depends on where it is.
    if is_deep(fields):
        return Line(number, problem=f"the line has more than {MOST_LEVELS} levels of JSON")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Line(number, problem=f"custom_id={short(custom_id)} is not a text")
    try:
        for name, rule in FIELDS.items():
            check_value(name, fields.get(name), rule)
    except ValueError as error:
        return Line(number, custom_id, problem=str(error))
    return Line(number, custom_id, fields["url"], fields["body"])


def is_deep(value: dict[str, Any] | list[Any], levels: int = MOST_LEVELS) -> bool:
    """Whether JSON has more than so many levels."""
    inner = value.values() if isinstance(value, dict) else value
    further = (each for each in inner if isinstance(each, (dict, list)))
    return levels == 0 or any(is_deep(each, levels - 1) for each in further)


def submit(llm: LLMEngine, line: Line, chat_template: str | None = None) -> range:
    """Adds the line's request to the engine and returns the ids of its samples.

    Raises:
        TypeError, ValueError: it cannot run.
    """
    if line.problem or line.body is None:
        raise ValueError(line.problem)
    prompt_field = PROMPT_FIELDS[line.url]
    fields = {name: value for name, value in line.body.items() if value is not None}
    if LIMITS & line.body.keys() and not LIMITS & fields.keys():
        fields["max_tokens"] = None
    if prompt_field not in fields:
        raise ValueError(f"body has no {prompt_field!r}, which {line.url} needs")
    prompt = fields.pop(prompt_field)
    chat_options = {name: fields.pop(name) for name in CHAT_FIELDS if name in fields}
    if line.url == CHAT:
        take_chat_fields(fields)
    params = _sampling_params(fields, llm.request_maker.defaults)
    if line.url == CHAT:
        ids = llm.texts.encode_chat(prompt, "messages", chat_template=chat_template, **chat_options)
    elif chat_options:
        raise ValueError(f"{', '.join(chat_options)} is for {CHAT} only")
    else:
        ids = llm.texts.encode(prompt, "prompt")
    check_value("n", params.n, CHOICES)
    first = llm.add_request(ids, params)
    return range(first, first + params.n)


def _sampling_params(fields: dict[str, Any], defaults: SamplingOptions) -> SamplingParams:
    for name in IGNORED:
        fields.pop(name, None)
    for name, rule in FIXED.items():
        if name in fields:
            check_value(name, fields.pop(name), rule)
    if "max_completion_tokens" in fields:
        if "max_tokens" in fields:
            raise ValueError("give either max_tokens or max_completion_tokens, not both")
        fields["max_tokens"] = fields.pop("max_completion_tokens")
    if "response_format" in fields:
        structure = _structure(fields.pop("response_format"))
        if structure.keys() & fields.keys():
            raise ValueError("give either json_schema or response_format, not both")
        fields |= structure
    return SamplingParams(**{**defaults, **fields})  # type: ignore[arg-type]


def _structure(response_format: Any) -> dict[str, Any]:
    """What OpenAI's `response_format` means, as a field of `SamplingParams`."""
    match response_format:
        case {"type": "text"}:
            return {}
        case {"type": "json_object"}:
            return {"json_schema": {"type": "object"}}
        case {"type": "json_schema", "json_schema": {"schema": schema}} if schema is not None:
            return {"json_schema": schema}
    raise ValueError(
        f"response_format={short(response_format)} is not allowed: its type must be 'text', "
        "'json_object', or 'json_schema' with {'json_schema': {'schema': ...}}"
    )


def error_line(line: Line, message: object, code: str = "invalid_request") -> dict[str, Any]:
    """The answer to a line that has no completion."""
    error = {"code": code, "message": str(message), "param": None, "line": line.number}
    return _result(line, None, error)


def answer_line(line: Line, completions: Sequence[Completion], model: str) -> dict[str, Any]:
    """The answer to a line of which all samples have ended; they may be in any order."""
    completions = sorted(completions, key=itemgetter("sample"))
    if any(completion["finish_reason"] == "error" for completion in completions):
        message = "logits are not numbers, no token is allowed, or the tokens have no text"
        return error_line(line, message, "server_error")
    is_chat = line.url == CHAT
    prompt_tokens = len(completions[0]["prompt_token_ids"])
    tokens = sum(len(completion["token_ids"]) for completion in completions)
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(line, completion) for completion in completions],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": prompt_tokens + tokens,
        },
    }
    response = {"status_code": 200, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
    return _result(line, response, None)


def _choice(line: Line, completion: Completion) -> dict[str, Any]:
    token_ids, logprobs = completion["token_ids"], completion["logprobs"]
    choice: dict[str, Any] = {
        "index": completion["sample"],
        "logprobs": None,
        "finish_reason": completion["finish_reason"],
        "stop_reason": completion["stop_reason"],
    }
    if line.url == CHAT:
        choice["message"] = {"role": "assistant", "content": completion["text"]}
        if logprobs is not None:
            count = (line.body or {}).get("top_logprobs") or 0
            choice["logprobs"] = chat_form(token_ids, logprobs, count)
    else:
        choice["text"] = completion["text"]
        if logprobs is not None:
            choice["logprobs"] = text_form(token_ids, logprobs)
    if completion["prompt_logprobs"] is not None:
        choice["prompt_logprobs"] = prompt_form(completion["prompt_logprobs"])
    return choice


def _result(line: Line, response: object, error: object) -> dict[str, Any]:
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
