"""What the engine refuses: every error by its message, and no harm to other requests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanovllm import LLM
from tests.checkpoints import VOCAB
from tests.engine.cases import GREEDY, OPTIONS, PROMPTS, check_empty, drain, tokens


def test_all_prompts_of_generate_are_checked_before_any_runs(llm):
    first = llm.next_request_id
    with pytest.raises(ValueError, match=r"^prompts\[2\] is empty"):
        llm.generate([[1], [2], [], [3]], use_tqdm=False)
    assert llm.next_request_id == first


BAD_PROMPTS = [
    ([], ValueError, "is empty: it must have at least one token"),
    ((), ValueError, "is empty: it must have at least one token"),
    ([5, -1], ValueError, "holds token id -1, which is outside the vocabulary: ids are from 0 to"),
    ([VOCAB], ValueError, f"holds token id {VOCAB}, which is outside the vocabulary"),
    ([2**70, 5], ValueError, f"holds token id {2**70}, which is outside the vocabulary"),
    ([1] * 65, ValueError, "has 65 tokens, but max_model_len allows 64"),
    ("text", ValueError, "is a text, but model="),
    (None, TypeError, "=None is neither a text nor a list of token ids"),
    (5, TypeError, "=5 is neither a text nor a list of token ids"),
    (b"bytes", TypeError, "=b'bytes' is neither a text nor a list of token ids"),
    (bytearray(b"x"), TypeError, "=bytearray(b'x') is neither a text nor a list of token ids"),
    ([1.0], TypeError, "=[1.0] is neither a text nor a list of token ids"),
    (["a"], TypeError, "=['a'] is neither a text nor a list of token ids"),
    ([[1]], TypeError, "=[[1]] is neither a text nor a list of token ids"),
    ([True], TypeError, "=[True] is neither a text nor a list of token ids"),
    ([1, True], TypeError, "=[1, True] is neither a text nor a list of token ids"),
    ([1, 2.0], TypeError, "=[1, 2.0] is neither a text nor a list of token ids"),
    (np.ones(2, bool), TypeError, "=array([ True,  True]) is neither a text nor a list of token"),
    ([None], TypeError, "=[None] is neither a text nor a list of token ids"),
    ({"prompt": [1]}, TypeError, "={'prompt': [1]} is neither a text nor a list of token ids"),
    ({1: 2}, TypeError, "={1: 2} is neither a text nor a list of token ids"),
    ({1: 2}.keys(), TypeError, "=dict_keys([1]) is neither a text nor a list of token ids"),
    ({5}, TypeError, "={5} is neither a text nor a list of token ids"),
    (frozenset({5}), TypeError, "=frozenset({5}) is neither a text nor a list of token ids"),
    (memoryview(b"x"), TypeError, "=<memory at"),
    (np.array(5), TypeError, "=array(5) is neither a text nor a list of token ids"),
    (np.ones((1, 2), int), TypeError, "=array([[1, 1]]) is neither a text nor a list of token"),
    (torch.tensor(5), TypeError, "=tensor(5) is neither a text nor a list of token ids"),
    (torch.tensor([[1, 2]]), TypeError, "=tensor([[1, 2]]) is neither a text nor a list of"),
    (torch.tensor([True]), TypeError, "=tensor([True]) is neither a text nor a list of token"),
    (torch.tensor([1.0]), TypeError, "=tensor([1.]) is neither a text nor a list of token ids"),
    ([torch.tensor([5])], TypeError, "=[tensor([5])] is neither a text nor a list of token ids"),
    ([torch.tensor(True)], TypeError, "=[tensor(True)] is neither a text nor a list of token"),
    ([np.array([5])], TypeError, "=[array([5])] is neither a text nor a list of token ids"),
    ([5, np.bool_(True)], TypeError, "=[5, "),
]


@pytest.mark.parametrize(
    ("prompt", "kind", "words"), BAD_PROMPTS, ids=lambda value: repr(value)[:30]
)
def test_a_bad_prompt_is_refused_alone(llm, expected, prompt, kind, words):
    queued = [llm.add_request(good, GREEDY) for good in PROMPTS]
    llm.step()
    with pytest.raises(kind) as caught:
        llm.add_request(prompt)
    assert str(caught.value).startswith("prompt" + (words if words[0] == "=" else f" {words}"))
    llm.step()
    with pytest.raises(kind) as caught:
        llm.generate([PROMPTS[0], prompt], use_tqdm=False)
    message = str(caught.value)
    assert message.startswith("prompts[1]" + (words if words[0] == "=" else f" {words}"))
    assert drain(llm) == dict(zip(queued, expected, strict=True))
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_a_text_without_a_tokenizer_says_what_to_do(llm, directory):
    with pytest.raises(ValueError, match="tokenizer") as caught:
        llm.generate("hello", use_tqdm=False)
    assert str(caught.value) == (
        f"prompts[0] is a text, but model={str(directory)!r} has no tokenizer: give token ids"
    )


def test_an_empty_text_is_refused(tiny):
    with pytest.raises(ValueError, match=r"^prompts\[0\] is empty: it must have at least one"):
        tiny.generate("", use_tqdm=False)


@pytest.mark.parametrize("text", ["\ud800", "Tom \udfff went"])
def test_a_text_that_cannot_be_encoded_is_refused_by_name(tiny, text):
    with pytest.raises(ValueError, match=r"^prompts\[1\]=.*cannot be encoded"):
        tiny.generate(["Tom", text], use_tqdm=False)
    with pytest.raises(ValueError, match=r"^prompt=.*cannot be encoded"):
        tiny.add_request(text)
    assert tiny.is_finished()


def test_a_prompt_over_all_kv_blocks_is_refused_alone(directory):
    with LLM(str(directory), num_kvcache_blocks=2, **OPTIONS) as engine:
        params = replace(GREEDY, max_tokens=4)
        queued = engine.add_request(PROMPTS[0], params)
        with pytest.raises(ValueError, match="33 tokens") as caught:
            engine.add_request([5] * 33)
        assert str(caught.value) == (
            "prompt has 33 tokens, but the KV cache, all of its blocks together, allows 32"
        )
        assert list(drain(engine)) == [queued]
        check_empty(engine)


@pytest.mark.parametrize(
    "given",
    [5, None, b"text", 1.5, {"prompt": "Tom"}, {"Tom"}, {"prompt_token_ids": [1, 2]}],
    ids=repr,
)
def test_prompts_that_are_no_list_are_refused(llm, given):
    with pytest.raises(TypeError) as caught:
        llm.generate(given, use_tqdm=False)
    assert str(caught.value) == f"prompts={given!r} is neither a text nor a list of prompts"


def test_a_flat_list_of_token_ids_is_refused(llm):
    with pytest.raises(TypeError, match=r"^prompts\[0\]=1 is neither a text nor a list of token"):
        llm.generate([1, 2, 3], use_tqdm=False)


@pytest.mark.parametrize("call", ["generate", "add_request"])
def test_an_unknown_sampling_option_is_named_with_the_nearest_valid_one(llm, call):
    prompt = [PROMPTS[0]] if call == "generate" else PROMPTS[0]
    with pytest.raises(TypeError) as caught:
        getattr(llm, call)(prompt, max_new_tokens=5)
    assert str(caught.value) == (
        "SamplingParams has no option 'max_new_tokens'; the nearest valid one is 'max_tokens'"
    )


@pytest.mark.parametrize("call", ["generate", "add_request"])
def test_a_bad_sampling_option_is_refused(llm, call):
    prompt = [PROMPTS[0]] if call == "generate" else PROMPTS[0]
    with pytest.raises(ValueError, match=r"^top_p=2 is not allowed: it must be a number above 0"):
        getattr(llm, call)(prompt, top_p=2)


@pytest.mark.parametrize("call", ["generate", "add_request"])
def test_sampling_params_and_single_options_together_are_refused(llm, call):
    prompt = [PROMPTS[0]] if call == "generate" else PROMPTS[0]
    with pytest.raises(TypeError) as caught:
        getattr(llm, call)(prompt, GREEDY, max_tokens=5, top_k=3)
    assert str(caught.value) == (
        "give either sampling_params or single options (max_tokens, top_k), not both"
    )


@pytest.mark.parametrize("count", [0, 1, 3, 5])
def test_sampling_params_of_the_wrong_number_are_refused(llm, count):
    with pytest.raises(ValueError, match="entries") as caught:
        llm.generate(PROMPTS, [GREEDY] * count, use_tqdm=False)
    assert str(caught.value) == (
        f"sampling_params has {count} entries for 4 prompts: give one, or one each"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "sampling_params=5 is neither a SamplingParams nor a list of them"),
        ([GREEDY, None, GREEDY, 5], "sampling_params holds None, which is no SamplingParams"),
        ({"top_k": 1}, "sampling_params holds 'top_k', which is no SamplingParams"),
        ("greedy", "sampling_params holds 'g', which is no SamplingParams"),
    ],
    ids=str,
)
def test_sampling_params_of_the_wrong_type_are_refused(llm, given, message):
    with pytest.raises(TypeError) as caught:
        llm.generate(PROMPTS, given, use_tqdm=False)
    assert str(caught.value) == message
