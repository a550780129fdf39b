"""Texts that are read token by token, against texts that are decoded as a whole."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import SamplingParams
from nanovllm.engine.detokenizer import INCOMPLETE, WINDOW, Detokenizer
from nanovllm.engine.prompts import UndecodableError
from tests.small_tokenizers import END, KINDS
from tests.stop_definition import stopped

TOKENIZERS = {kind: build() for kind, build in KINDS.items()}
PROMPT = [0, 1, 2]  # what is read begins behind it


def make(decode, first: int = 0, stops=(), keep_stop=False, silent=()) -> Detokenizer:
    params = SamplingParams(stop=stops, include_stop_str_in_output=keep_stop)
    return Detokenizer(decode, first, params, silent)


def read(decode, ids: list[int], stops=(), keep_stop=False) -> tuple[Detokenizer, int]:
    """Reads token by token up to a stop text; also says how many tokens that took."""
    detokenizer = make(decode, len(PROMPT), stops, keep_stop)
    told = ""
    for count in range(1, len(ids) + 1):
        reason = detokenizer.read(PROMPT + ids[:count])
        assert reason == (None if detokenizer.progress.stop is None else "stop")
        # What was told stays, and no token is read twice.
        text, end = detokenizer.safe_text()
        assert (text[: len(told)], end) == (told, len(PROMPT) + count)
        told = text
        if reason:
            break
    final = detokenizer.whole_text(PROMPT + ids)
    assert final.startswith(told)
    return detokenizer, count


def check_stops(decode, ids: list[int], stops) -> bool:
    """Both ways to keep or drop the stop text, against the definition; whether there is one."""
    for keep_stop in (False, True):
        detokenizer, tokens = read(decode, ids, stops, keep_stop)
        text = detokenizer.whole_text(PROMPT + ids)
        expected = stopped(decode, ids, stops, keep_stop)
        assert (text, ids[:tokens], detokenizer.progress.stop) == expected
    return expected[2] is not None


# ------------------------------------------------------------------ texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skip", [True, False])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_text_of_tokens_read_one_by_one_is_that_of_all(kind, skip, data):
    """Also amid letters and behind broken ones, but for sentence pieces.

    These judge neighbouring bytes together, so that a broken letter breaks the ones before.
    """
    tokenizer = TOKENIZERS[kind]
    vocab = tokenizer.get_vocab_size()
    groups = st.integers(0, vocab - 1).map(lambda token: [token])
    if kind == "sentence pieces":
        byte = tokenizer.token_to_id("<0x00>")
        plain = [token for token in range(vocab) if not byte <= token < byte + 256]
        letters = st.sampled_from("é日🙂a").map(lambda text: [byte + b for b in text.encode()])
        groups = letters | st.sampled_from(plain).map(lambda token: [token])

    def decode(token_ids: list[int]) -> str:
        return tokenizer.decode(token_ids, skip_special_tokens=skip)

    silent = [tokenizer.token_to_id(END)] if skip else ()
    detokenizer, ids = make(decode, len(PROMPT), silent=silent), list(PROMPT)
    for group in data.draw(st.lists(groups, max_size=3 * WINDOW)):
        for token in group:
            ids.append(token)
            assert detokenizer.read(ids) is None
        whole = decode(ids[len(PROMPT) :])
        assert detokenizer.whole_text(ids) == whole
        assert whole.startswith(detokenizer.safe_text()[0])


def test_a_window_is_short_whatever_the_length_of_the_text():
    longest = []

    def decode(token_ids: list[int]) -> str:
        longest.append(len(token_ids))
        return TOKENIZERS["bytes"].decode(token_ids)

    ids = [*"日本 and stop ".encode()] * 50
    detokenizer, _ = read(decode, ids)
    assert max(longest) < 2 * WINDOW
    assert detokenizer.safe_text()[0] == bytes(ids).decode()


def test_all_but_an_incomplete_letter_is_told_at_once():
    told = []
    detokenizer = make(TOKENIZERS["bytes"].decode)
    ids = [*"aé".encode(), *b"\xf0\x9f", *"b🙂".encode()]
    for count in range(1, len(ids) + 1):
        detokenizer.read(ids[:count])
        told.append(detokenizer.safe_text()[0])
    broken = f"aé{INCOMPLETE}b"
    assert told == ["a", "a", "aé", "aé", "aé", broken, *[broken] * 3, f"{broken}🙂"]


def test_reading_goes_on_after_it_was_broken_off():
    """Whether at the tokenizer's error or at a line of its own: see also tests/interrupts.py."""
    calls = itertools.count()

    def decode(token_ids: list[int]) -> str:
        if next(calls) % 3 == 0:
            raise UndecodableError
        if next(calls) % 5 == 0:
            raise KeyboardInterrupt
        return TOKENIZERS["bytes"].decode(token_ids)

    ids = [*"aé 日本 stop it".encode()]
    detokenizer, reasons = make(decode, stops=["stop"]), set()
    for count in range(1, len(ids) + 1):
        for _ in range(20):
            try:
                reason = detokenizer.read(ids[:count])
            except KeyboardInterrupt:
                continue
            reasons.add(reason)
            if reason != "error":
                break
        if reason == "stop":
            break
    assert reasons == {None, "error", "stop"}
    assert (detokenizer.whole_text(ids), count) == ("aé 日本 ", len(ids) - 3)


# ------------------------------------------------------------------ stop texts


def splits(length: int) -> Iterator[list[int]]:
    """All ways to cut so many letters into parts: where each part ends."""
    for cuts in itertools.product([False, True], repeat=length - 1):
        yield [i for i, cut in enumerate(cuts, 1) if cut] + [length]


CASES = [
    ("abcabd", ["abd"]),
    ("aabaab", ["aab", "ba"]),  # the first is complete before the other
    ("xaaab", ["aab", "aaab", "b"]),  # all complete at once: the longest counts
    ("abab", ["b", "aba"]),  # "aba" would begin first
    ("ababac", ["abac"]),  # its beginning comes twice
    ("abcd", ["abcd"]),
    ("abcd", ["d", "bcx"]),
    ("abcd", ["x", "da", "abcde"]),
    ("a日é🙂", ["日é"]),
    ("é日", ["日", "é日x"]),
]


@pytest.mark.parametrize(("text", "stops"), CASES)
def test_a_stop_text_is_found_however_the_text_is_divided(text, stops):
    """Into texts that are tokens, and into bytes, which may be parts of letters."""
    data = text.encode()
    for whole, join in (
        (text, "".join),
        (data, lambda parts: b"".join(parts).decode("utf-8", "replace")),
    ):
        for ends in splits(len(whole)):
            parts = [whole[i:j] for i, j in itertools.pairwise([0, *ends])]

            def decode(ids: list[int], parts=parts, join=join) -> str:
                return join([parts[i] for i in ids])

            found = check_stops(decode, [*range(len(parts))], stops)
            assert found == any(stop in text for stop in stops)


PARTS = st.text("ab日\N{REPLACEMENT CHARACTER}", min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(PARTS, min_size=1, max_size=12), stops=st.lists(PARTS, max_size=3))
def test_so_is_any_stop_text(parts, stops):
    check_stops(lambda ids: "".join(parts[i] for i in ids), [*range(len(parts))], stops)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_so_it_is_in_the_tokens_of_a_byte_level_tokenizer(data):
    tokenizer = TOKENIZERS["bytes"]
    likely = [*b"stop \n", *range(256, tokenizer.get_vocab_size())]
    ids = data.draw(st.lists(st.sampled_from(likely), min_size=1, max_size=40))
    text = tokenizer.decode(ids)
    pieces = [text[i : i + size] for i in range(0, len(text), 3) for size in (1, 2, 5)]
    some = st.sampled_from([*filter(None, pieces), "stop", "op\n\nst", "x"])
    check_stops(tokenizer.decode, ids, data.draw(st.lists(some, max_size=3)))


def test_text_that_may_become_a_stop_text_is_held_back():
    detokenizer = make(lambda ids: "".join(map(chr, ids)), stops=["STOP", "\n\n"])
    told = []
    for count, _ in enumerate(ids := [*map(ord, "ab\nSTST\nSTOP")], 1):
        detokenizer.read(ids[:count])
        told.append(detokenizer.safe_text()[0])
    assert told[:8] == ["a", "ab", "ab", "ab\n", "ab\n", "ab\nST", "ab\nST", "ab\nSTST"]
    assert told[8:] == ["ab\nSTST\n"] * 4
