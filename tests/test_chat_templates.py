"""Chat templates of the forms of Qwen2.5, Qwen3 and Llama 3, with small tokenizers of our own."""

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nanovllm.engine.prompts import TextProcessor

SYSTEM = {"role": "system", "content": "Be short."}
USER = {"role": "user", "content": " Who is Tom? "}
ANSWER = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nA fox."}
IM = ("<|im_start|>", "<|im_end|>")
HEADER = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

# A system message is there in any case.
QWEN25 = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Earlier thoughts are left out, and the next ones may be turned off.
QWEN3 = """\
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and not loop.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
# Writes the first token itself, which the tokenizer adds to plain texts.
LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CASES = [
    (
        (QWEN25, IM),
        ([USER], {}),
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\n Who is Tom? <|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        (QWEN25, IM),
        ([SYSTEM, USER], {"add_generation_prompt": False}),
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n Who is Tom? <|im_end|>\n",
    ),
    (
        (QWEN3, IM),
        ([USER, ANSWER, USER], {}),
        "<|im_start|>user\n Who is Tom? <|im_end|>\n<|im_start|>assistant\nA fox.<|im_end|>\n"
        "<|im_start|>user\n Who is Tom? <|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        (QWEN3, IM),
        ([USER], {"chat_template_kwargs": {"enable_thinking": False}}),
        "<|im_start|>user\n Who is Tom? <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    (
        (LLAMA3, HEADER),
        ([SYSTEM, USER], {}),
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho is Tom?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
]

# Calls of tools, as Qwen2.5's template and that of Llama 3.1 write them.
TOOLS = """\
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}
            {{- call.function.name + ': ' }}{{ call.function.arguments | tojson }}
        {%- endfor %}
    {%- else %}
        {{- message['content'] | trim }}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
"""


def make_tokenizer(template: str, special: tuple[str, ...]) -> PreTrainedTokenizerFast:
    """A token for each byte and each special token; the first of Llama's begins every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    options: dict[str, Any] = {"eos_token": special[-1]}
    if special is HEADER:
        options["bos_token"] = special[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A",
            special_tokens=[(special[0], tokenizer.token_to_id(special[0]))],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **options)


@pytest.mark.parametrize(("tokenizer", "call", "text"), CASES)
def test_a_conversation_becomes_the_tokens_that_the_model_was_trained_on(tokenizer, call, text):
    template, special = tokenizer
    messages, options = call
    made = make_tokenizer(template, special)
    texts = TextProcessor("model", made, len(made), {"max_model_len": 4096})
    ids = texts.encode_chat(messages, "messages[0]", **options)
    assert made.decode(ids, skip_special_tokens=False) == text
    for token in special:
        assert ids.count(made.convert_tokens_to_ids(token)) == text.count(token)
    if special is HEADER:  # a plain text gets the first token from the tokenizer
        assert texts.encode("Tom", "prompt")[0] == ids[0]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ('{"city": "K\\u00f6ln"}', 'find: {"city": "Köln"}'),
        ({"city": "Köln"}, 'find: {"city": "Köln"}'),
        ("", "find: {}"),
    ],
)
def test_arguments_of_a_tool_call_may_be_json_as_in_openais_format(given, text):
    made = make_tokenizer(TOOLS, IM)
    texts = TextProcessor("model", made, len(made), {"max_model_len": 4096})
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": given}}
    # What OpenAI's client says of fields that an answer does not have.
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
    plain = [{**ANSWER, "content": "Hm.", "tool_calls": calls} for calls in (None, [])]
    ids = texts.encode_chat([answer, *plain], "messages[0]", add_generation_prompt=False)
    expected = f"{text}<|im_end|>" + "Hm.<|im_end|>" * 2
    assert made.decode(ids, skip_special_tokens=False) == expected
    assert call["function"]["arguments"] is given
