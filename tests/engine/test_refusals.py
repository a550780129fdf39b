"""What the engine refuses: every error by its message, and no harm to other requests."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from nanovllm import LLM
from nanovllm.utils.options import short
from tests.checkpoints import VOCAB
from tests.engine.cases import GREEDY, OPTIONS, PROMPTS, check_empty, drain, tokens


def test_all_prompts_of_generate_are_checked_before_any_runs(llm):
    first = llm.next_request_id
    with pytest.raises(ValueError, match=r"^prompts\[2\] is empty"):
        llm.generate([[1], [2], [], [3]], use_tqdm=False)
    assert llm.next_request_id == first


NO_TOKEN_IDS = [
    *(None, 5, b"bytes", bytearray(b"x"), memoryview(b"x"), {"prompt": [1]}, {1: 2}, {1: 2}.keys()),
    *([1.0], ["a"], [[1]], [True], [1, True], [1, 2.0], [None], {5}, frozenset({5})),
    *(np.array(5), np.ones((1, 2), int), np.ones(2, bool), [np.array([5])], [5, np.bool_(True)]),
    *(torch.tensor(5), torch.tensor([[1, 2]]), torch.tensor([True]), torch.tensor([1.0])),
    *([torch.tensor([5])], [torch.tensor(True)]),
    *(
        np.array("a"),
        np.array(b"a"),
        {},
        {"prompt": None},
        {"prompt_token_ids": "text"},
        {"prompt_token_ids": None},
    ),
    *({"prompt": "a", "prompt_token_ids": [1]}, {"prompt": "a", "multi_modal_data": {}}),
]
# What the error names besides the prompt.
BAD_PROMPTS = [
    ([], ValueError, ["empty", "at least one token"]),
    ((), ValueError, ["empty", "at least one token"]),
    ([5, -1], ValueError, ["token id -1", "vocabulary", "from 0 to"]),
    ([VOCAB], ValueError, [f"token id {VOCAB}", "vocabulary"]),
    ([2**70, 5], ValueError, [f"token id {2**70}", "vocabulary"]),
    ([1] * 65, ValueError, ["65 tokens", "max_model_len", "64"]),
    ("text", ValueError, ["a text", "model="]),
    ({"prompt_token_ids": []}, ValueError, ["empty", "at least one token"]),
    ({"prompt": "text"}, ValueError, ["a text", "no tokenizer"]),
    *((value, TypeError, [f"={short(value)}"[:9], "list of token ids"]) for value in NO_TOKEN_IDS),
]


@pytest.mark.parametrize(
    ("prompt", "kind", "words"),
    BAD_PROMPTS,
    ids=lambda value: repr(value).partition(" at 0x")[0][:30],
)
def test_a_bad_prompt_is_refused_alone(llm, expected, prompt, kind, words):
    queued = [llm.add_request(good, GREEDY) for good in PROMPTS]
    calls = {
        "prompt": lambda: llm.add_request(prompt),
        "prompts[1]": lambda: llm.generate([PROMPTS[0], prompt], use_tqdm=False),
    }
    for name, call in calls.items():
        llm.step()
        with pytest.raises(kind) as caught:
            call()
        assert str(caught.value).startswith((f"{name} ", f"{name}="))
        assert all(word in str(caught.value) for word in words), caught.value
    assert drain(llm) == dict(zip(queued, expected, strict=True))
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_text_without_a_tokenizer_says_what_to_do(llm, directory):
    with pytest.raises(
        ValueError, match=r"^prompts\[0\] .* no tokenizer: give token ids"
    ) as caught:
        llm.generate("hello", use_tqdm=False)
    assert f"model={str(directory)!r}" in str(caught.value)


def test_a_text_that_is_empty_or_cannot_be_encoded_is_refused_by_name(tiny):
    for text, words in (("", " is empty"), ("Tom\ud800", "=.*cannot be encoded: .*surrogates")):
        with pytest.raises(ValueError, match=rf"^prompts\[1\]{words}"):
            tiny.generate(["Tom", text], use_tqdm=False)
        with pytest.raises(ValueError, match=f"^prompt{words}"):
            tiny.add_request(text)
    assert tiny.is_finished()


def test_a_prompt_over_all_kv_blocks_is_refused_alone(directory):
    with LLM(str(directory), num_kvcache_blocks=2, **OPTIONS) as engine:
        params = replace(GREEDY, max_tokens=4)
        queued = engine.add_request(PROMPTS[0], params)
        with pytest.raises(ValueError, match=r"^prompt has 33 tokens, .*KV cache.* 32$"):
            engine.add_request([5] * 33)
        assert list(drain(engine)) == [queued]
        check_empty(engine)


NO_PROMPTS = [5, None, b"text", 1.5, {"Tom"}, np.array("Tom")]
NO_PARAMS = [(5, "5"), ([GREEDY, None, GREEDY, 5], "None"), ({"top_k": 1}, "'top_k'"),
             ("greedy", "'g'")]  # fmt: skip
BAD_OPTIONS = [
    ([], {"max_new_tokens": 5}, TypeError, r"'max_new_tokens'.* 'max_tokens'"),
    ([], {"top_p": 2}, ValueError, r"^top_p=2 .*above 0"),
    ([GREEDY], {"max_tokens": 5, "top_k": 3}, TypeError, r"sampling_params.*max_tokens, top_k"),
    ([], {"stop": "x"}, ValueError, r"^stop and deltas are not allowed: .*no tokenizer"),
    ([], {"logit_bias": {3: 1, VOCAB: 1}}, ValueError,
     rf"^logit_bias holds token id {VOCAB}, .*: ids are from 0 to {VOCAB - 1}$"),
    ([], {"logit_bias": {10**5000: 1}}, ValueError, r"^logit_bias holds token id <an integer of"),
    ([], {"n": 10**5000}, ValueError, r"^n=<an integer of \d+ bits> .*from 1 to 16384$"),
]  # fmt: skip
HUGE = {"prompts": 10**5000, r"prompts\[0\]": [[10**5000, 1.5]]}
# Arguments of `generate`, and its error.
BAD_CALLS = [
    *(
        ([x], {}, TypeError, rf"^prompts={re.escape(repr(x))} .*list of prompts")
        for x in NO_PROMPTS
    ),
    *(([x], {}, TypeError, f"^{name}=.*<an integer of") for name, x in HUGE.items()),
    ([[1, 2, 3]], {}, TypeError, r"^prompts\[0\]=1 is neither a text nor a list of token"),
    *(
        ([PROMPTS, [GREEDY] * n], {}, ValueError, f"^sampling_params has {n} entries for 4 prompts")
        for n in (0, 1, 5)
    ),
    *(
        ([PROMPTS, given], {}, TypeError, f"^sampling_params.*{named}.* SamplingParams")
        for given, named in NO_PARAMS
    ),
    *(([PROMPTS, *params], *rest) for params, *rest in BAD_OPTIONS),
]


@pytest.mark.parametrize(("args", "options", "kind", "match"), BAD_CALLS)
def test_a_bad_call_of_generate_is_refused(llm, args, options, kind, match):
    with pytest.raises(kind, match=match):
        llm.generate(*args, **options, use_tqdm=False)


@pytest.mark.parametrize(("params", "options", "kind", "match"), BAD_OPTIONS)
def test_so_is_a_bad_option_of_a_request(llm, params, options, kind, match):
    with pytest.raises(kind, match=match):
        llm.add_request(PROMPTS[0], *params, **options)
