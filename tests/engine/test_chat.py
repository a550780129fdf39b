"""Conversations: what the template makes of them, and what is refused."""

import shutil
from enum import Enum

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.tiny import CHECKPOINT_DIR
from tests.engine.cases import said

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ prefix | default('assistant') }}: {% endif %}"
)
TOM = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Who is Tom?"}]
ANNA = [{"role": "user", "content": "Who is Anna?"}]
PARAMS = SamplingParams(temperature=0, max_tokens=6)
TEXT = "system: Short.\nuser: Who is Tom?\n"


def chat(engine, messages, **options):
    options.setdefault("chat_template", TEMPLATE)
    return engine.chat(messages, PARAMS, use_tqdm=False, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, TEXT + "assistant: "),
        ({"add_generation_prompt": False}, TEXT),
        ({"chat_template_kwargs": {"prefix": "Tom"}}, TEXT + "Tom: "),
        ({"chat_template": "{{ messages[1]['content'] }}"}, "Who is Tom?"),
        # Names of parameters on the way to the template.
        (
            {
                "chat_template": "{{ function }} {{ lock }}",
                "chat_template_kwargs": {"function": "Who", "lock": "is"},
            },
            "Who is",
        ),
    ],
)
def test_a_conversation_is_the_text_that_the_template_makes_of_it(tiny, options, text):
    answers = chat(tiny, TOM, **options)
    assert said(answers) == said(tiny.generate(text, PARAMS, use_tqdm=False))


def test_conversations_are_answered_in_order_each_with_its_own_options(tiny):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (3, 5)]
    outputs = tiny.chat([TOM, ANNA], params, chat_template=TEMPLATE, use_tqdm=False)
    assert [len(output["token_ids"]) for output in outputs] == [3, 5]
    for messages, output in zip((TOM, ANNA), outputs, strict=True):
        (alone,) = chat(tiny, messages)
        assert alone["token_ids"][: len(output["token_ids"])] == output["token_ids"]
    (one,) = tiny.chat(ANNA, temperature=0, max_tokens=5, chat_template=TEMPLATE, use_tqdm=False)
    assert said([one]) == said(outputs[1:])
    assert chat(tiny, []) == []


def test_parts_of_text_are_joined_and_the_messages_stay_as_they_are(tiny):
    name = Enum("Name", {"TOM": "Tom?"}, type=str).TOM
    parts = [{"type": "text", "text": "Who is"}, {"type": "text", "text": name}]
    messages = [{"role": "user", "content": parts}]
    joined = [{"role": "user", "content": "Who is\nTom?"}]
    assert said(chat(tiny, messages)) == said(chat(tiny, joined))
    assert messages[0]["content"] is parts


def test_the_tokenizers_own_template_is_the_default(tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(CHECKPOINT_DIR, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    with LLM(directory, device="cpu") as engine:
        expected = engine.generate(TEXT + "assistant: ", PARAMS, use_tqdm=False)
        assert said(chat(engine, TOM, chat_template=None)) == said(expected)


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
REFUSED = [
    ("Who is Tom?", {}, TypeError, r"^messages='Who is Tom\?' is neither a conversation nor"),
    (TOM[0], {}, TypeError, r"^messages={.*'role': .* is neither a conversation nor"),
    ([TOM, "x"], {}, TypeError, r"^messages\[1\]='x' is not a list of messages"),
    ([10**5000], {}, TypeError, r"^messages\[0\]=<an integer of"),
    ([{"role": 10**5000}], {}, TypeError, r"^messages\[0\]\[0\]=.*<an integer of"),
    ([TOM, []], {}, ValueError, r"^messages\[1\] is empty"),
    ([*TOM, "x"], {}, TypeError, r"^messages\[0\]\[2\]='x' is not a dict with .* 'role'"),
    ([{"content": "x"}], {}, TypeError, r"^messages\[0\]\[0\]=.*'role'"),
    ([{"role": "user", "content": 5}], {}, TypeError, r"\['content'\]=5 is neither a text"),
    ([{"role": "user", "content": [IMAGE]}], {}, TypeError, r"parts of type 'text'"),
    ([{**TOM[0], "tool_calls": 5}], {}, TypeError, r"\['tool_calls'\]=5 is no list"),
    (
        [{**TOM[0], "tool_calls": [{"function": {"arguments": "{"}}]}],
        {},
        ValueError,
        r"^messages\[0\]\[0\]\['tool_calls'\]\[0\]\['function'\]\['arguments'\]='{' is no JSON",
    ),
    ([{"role": "user"}], {}, ValueError, r"^messages\[0\] does not fit the chat template.*content"),
    ([{"role": "user", "content": "Tom\ud800"}], {}, ValueError, r"^messages\[0\] .*surrogates"),
    (TOM, {"chat_template": "{% if %}"}, ValueError, r"^messages\[0\] does not fit .*TemplateSynt"),
    (TOM, {"chat_template": "{{ raise_exception('no') }}"}, ValueError, r"does not fit.*no"),
    (TOM, {"chat_template": ""}, ValueError, r"^messages\[0\] is empty"),
    (TOM, {"chat_template": 5}, TypeError, r"^chat_template=5 is neither None nor a text"),
    (TOM, {"add_generation_prompt": "no"}, TypeError, r"^add_generation_prompt='no' is no bool"),
    (TOM, {"chat_template_kwargs": [1]}, TypeError, r"^chat_template_kwargs=\[1\] is neither"),
    (TOM, {"chat_template_kwargs": {"tokenize": False}}, TypeError, r"must not hold 'tokenize'"),
    # Which would cut a prompt, or fill it up.
    (
        TOM,
        {"chat_template_kwargs": {"truncation": True, "max_length": 3}},
        TypeError,
        r"must not hold 'max_length', 'truncation'",
    ),
    (TOM, {"chat_template_kwargs": {"padding": "max_length"}}, TypeError, r"hold 'padding'"),
    (TOM, {"chat_template": None}, ValueError, r"has no chat template.*chat_template=\.\.\."),
    (TOM, {"chat_template": "a " * 9999}, ValueError, r"^messages\[0\] has .* max_model_len"),
    (TOM, {"top_k": 5}, TypeError, r"^give either sampling_params or single options"),
]


@pytest.mark.parametrize(("messages", "options", "kind", "match"), REFUSED)
def test_a_bad_call_of_chat_is_refused_and_says_why(tiny, messages, options, kind, match):
    first = tiny.next_request_id
    with pytest.raises(kind, match=match):
        chat(tiny, messages, **options)
    assert tiny.next_request_id == first


def test_without_a_tokenizer_there_is_no_chat(llm):
    with pytest.raises(ValueError, match=r"has no tokenizer, and so no chat template"):
        chat(llm, TOM)
