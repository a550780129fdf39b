"""Where texts end: stop texts, special tokens, and the limits of a request."""

import random
from dataclasses import replace

import pytest

from nanovllm import SamplingParams
from tests import small_tokenizers
from tests.engine.cases import GREEDY, PROMPTS, SCHEDULES, drain, said, scheduled, tokens
from tests.stop_definition import stopped

LONG = replace(GREEDY, max_tokens=24)


@pytest.fixture(scope="module")
def plain(speaker) -> list[dict]:
    """What the model says after PROMPTS, with texts."""
    return speaker.generate(PROMPTS, LONG, use_tqdm=False)


def random_stops(draw: random.Random, text: str) -> list[str]:
    """Parts of a text, what is almost a part, and what is none."""
    starts = [draw.randrange(len(text)) for _ in range(draw.randint(1, 3))]
    stops = [text[start : start + draw.randint(1, 6)] for start in starts]
    return [*stops, stops[0] + "\N{SNOWMAN}", "nowhere"]


@pytest.mark.parametrize("options", [*SCHEDULES, {"tensor_parallel_size": 2}], ids=str)
def test_a_request_ends_where_a_stop_text_is_complete(speaking, plain, options):
    draw = random.Random(seed := random.randrange(10**6))
    print("seed", seed)
    with scheduled(speaking, options) as engine:
        for keep_stop in (False, True, False):
            params, expected = [], []
            for output in plain:
                stops = random_stops(draw, output["text"])
                given = stops[0] if draw.random() < 0.2 else stops
                params.append(replace(LONG, stop=given, include_stop_str_in_output=keep_stop))
                stops = stops[:1] if given is stops[0] else stops
                expected.append(
                    stopped(engine.tokenizer.decode, output["token_ids"], stops, keep_stop)
                )
            # Beside requests that ask for nothing.
            outputs = engine.generate(PROMPTS * 2, params + [LONG] * 4, use_tqdm=False)
            assert said(outputs[4:]) == said(plain)
            outputs = outputs[:4]
            found = [(o["text"], o["token_ids"], o["stop_reason"]) for o in outputs]
            assert found == expected
            reasons = [output["finish_reason"] for output in outputs]
            assert reasons == ["length" if stop is None else "stop" for *_, stop in expected]


def test_only_requests_that_ask_read_their_texts(spoken, plain, monkeypatch):
    calls = []
    decode = spoken.tokenizer.decode
    monkeypatch.setattr(
        spoken.tokenizer, "decode", lambda ids, **o: (calls.append(ids), decode(ids, **o))[1]
    )
    params = [LONG, LONG, replace(LONG, stop="nowhere"), LONG]
    assert said(spoken.generate(PROMPTS, params, use_tqdm=False)) == said(plain)
    assert len(calls) < 3 + 2 * LONG.max_tokens
    assert spoken.generate(PROMPTS, LONG, use_tqdm=False)
    assert calls[-4:] == tokens(plain)


def test_tokens_without_a_text_are_not_decoded_again_with_each(spoken, monkeypatch):
    """As a model goes on with ends of sequence that are ignored."""
    decoded, decode = [], spoken.tokenizer.decode
    monkeypatch.setattr(
        spoken.tokenizer, "decode", lambda ids, **o: (decoded.extend(ids), decode(ids, **o))[1]
    )
    end = spoken.tokenizer.convert_tokens_to_ids(small_tokenizers.END)
    params = SamplingParams(logit_bias={end: 1000}, max_tokens=50, ignore_eos=True)
    *_, last = spoken.stream([[5]], params, deltas=True)
    assert (last["finish_reason"], len(decoded)) == ("length", 50)  # at the end, of all together


def test_a_stop_text_across_the_end_of_the_limit_does_not_count(spoken, plain):
    text = plain[0]["text"]
    params = replace(LONG, stop=text + "!")
    assert said(spoken.generate([PROMPTS[0]], params, use_tqdm=False)) == said(plain[:1])
    params = replace(LONG, stop=text[-1:], include_stop_str_in_output=True)
    (output,) = spoken.generate([PROMPTS[0]], params, use_tqdm=False)
    assert output["finish_reason"] == "stop"  # and not "length", at the latest with the last


def test_a_tokenizer_that_fails_ends_only_the_request_that_asks(spoken, plain, monkeypatch, caplog):
    decode, ids = spoken.tokenizer.decode, plain[1]["token_ids"]
    bad = ids[2]
    others = [i for i in (0, 2, 3) if bad not in plain[i]["token_ids"]]

    def fail(token_ids, **options):
        if bad in token_ids:
            raise IndexError("no such piece")
        return decode(token_ids, **options)

    monkeypatch.setattr(spoken.tokenizer, "decode", fail)
    outputs = spoken.generate(PROMPTS, replace(LONG, stop="nowhere"), use_tqdm=False)
    assert others
    assert said(outputs[i] for i in others) == said(plain[i] for i in others)
    assert said(outputs[1:2]) == [(decode(ids[:2]), ids[:3], "error")]
    assert "its text cannot be decoded: IndexError: no such piece" in caplog.text


# ------------------------------------------------------------------ tokens that end a text


STORY = "The little fox"


def tell(tiny, **options):
    options = {"temperature": 0, "max_tokens": 300, "use_tqdm": False, **options}
    (output,) = tiny.generate(STORY, **options)
    return output


def test_the_text_of_the_token_that_stopped_it_is_left_out_unless_asked_for(tiny):
    decode, eos = tiny.tokenizer.decode, tiny.tokenizer.eos_token_id
    whole = tell(tiny)
    ids = whole["token_ids"]
    assert (ids[-1], whole["stop_reason"]) == (eos, None)
    for keep in (False, True):
        options = {"skip_special_tokens": False, "include_stop_str_in_output": keep}
        output = tell(tiny, **options)
        assert output["text"] == decode(ids if keep else ids[:-1])
        assert output["token_ids"] == ids
        # With a stop text as well, which is read token by token, and comes too late.
        again = tell(tiny, **options, stop=["nowhere", "im_end|>!"])
        assert said([again]) == said([output])
        word = ids[20]
        output = tell(tiny, **options, stop_token_ids=[word], stop="nowhere")
        count = ids.index(word) + 1
        assert output["text"] == decode(ids[: count if keep else count - 1])
        assert (output["token_ids"], output["stop_reason"]) == (ids[:count], word)


def test_an_eos_token_is_a_reason_only_where_it_would_not_end_the_request_anyway(tiny):
    eos = tiny.tokenizer.eos_token_id
    assert tell(tiny, stop_token_ids=[eos])["stop_reason"] is None
    output = tell(tiny, stop_token_ids=[eos], ignore_eos=True)
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", eos)


def test_a_stop_text_may_be_that_of_a_special_token(tiny):
    output = tell(tiny, skip_special_tokens=False, ignore_eos=True, stop="<|im_end|>")
    assert (output["text"], output["stop_reason"]) == (tell(tiny)["text"], "<|im_end|>")


def test_added_requests_have_stop_texts_too(spoken, plain):
    stop = plain[2]["text"][3:6]
    params = replace(LONG, stop=(stop,))
    _, ids, _ = stopped(spoken.tokenizer.decode, plain[2]["token_ids"], [stop], False)
    request = spoken.add_request(PROMPTS[2], params)
    assert drain(spoken) == {request: ids}


def test_defaults_of_a_request_are_those_of_the_class():
    assert SamplingParams(stop=None) == SamplingParams(stop=[]) == SamplingParams()
