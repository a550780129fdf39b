"""Completions follow JSON schemas, regexes and grammars, whatever else the engine is doing."""

import contextlib
import json
import random
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from transformers import Qwen3Config

from nanovllm import LLM, SamplingParams
from nanovllm.kernels.reference_sampling import SAMPLE_TILE
from nanovllm.structured import grammars
from nanovllm.tiny import CHECKPOINT_DIR, PROMPTS
from tests.checkpoints import Shape
from tests.engine.cases import PIPELINED, drain, steps
from tests.interrupts import Interrupt, InterruptAt

pytest.importorskip("xgrammar", reason="structured output needs xgrammar")
from tests.grammar_walks import refused_tokens
from tests.structured_runs import errors, run

OPTIONS = {"device": "cpu", "max_model_len": 512, "kvcache_block_size": 16}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
}
REGEX = r"(cat|dog) [0-9]{2,4}(, [a-z]+){1,3}\."
GRAMMAR = 'root ::= "(" root ")" | "[" root "]" | [a-z]{1,9}'
ASKING = [
    {"json_schema": SCHEMA, "temperature": 1.0, "max_tokens": 200, "seed": 1},
    {"regex": REGEX, "temperature": 0.8, "max_tokens": 100, "seed": 2},
    {"grammar": GRAMMAR, "temperature": 1.5, "max_tokens": 100, "seed": 3},
]
PLAIN = {"temperature": 0.0, "max_tokens": 40}
MIXED = [
    SamplingParams(**ASKING[i % 4]) if i % 4 < 3 else SamplingParams(**PLAIN) for i in range(8)
]


@pytest.fixture(scope="module")
def engine():
    with LLM(**OPTIONS) as llm:
        yield llm


def mixed(llm: LLM) -> list[tuple[list[int], str]]:
    """Tokens and reasons of requests of all kinds in one batch, which are checked."""
    outputs = llm.generate(list(PROMPTS[:8]), MIXED, use_tqdm=False)
    for i, output in enumerate(outputs):
        if output["finish_reason"] == "stop":
            check(output["text"], i % 4)
    return [(output["token_ids"], output["finish_reason"]) for output in outputs]


def check(text: str, kind: int) -> None:
    if kind == 0:
        assert not errors(SCHEMA, text)
    elif kind == 1:
        assert re.fullmatch(REGEX, text)
    elif kind == 2:
        inner = text.strip("()[]")
        assert re.fullmatch("[a-z]{1,9}", inner)
        opening, closing = text.split(inner)
        assert closing[::-1].translate(str.maketrans(")]", "([")) == opening


@pytest.fixture(scope="module")
def expected(engine) -> list[tuple[list[int], str]]:
    results = mixed(engine)
    assert [reason for _, reason in results].count("stop") >= 5
    return results


def test_completions_that_end_are_valid_by_random_schemas(engine):
    first = random.randrange(10**6)
    ended, wrong = run(engine, range(first, first + 60))
    assert not wrong, first
    assert ended >= 45, first


def test_plain_rows_draw_the_same_tokens_beside_others(engine, expected):
    prompts = [prompt for i, prompt in enumerate(PROMPTS[:8]) if i % 4 == 3]
    alone = engine.generate(prompts, **PLAIN, use_tqdm=False)
    assert [output["token_ids"] for output in alone] == [tokens for tokens, _ in expected[3::4]]


@pytest.mark.parametrize(
    "options",
    [
        {"num_kvcache_blocks": 9, "max_num_batched_tokens": 13},
        PIPELINED,
        {"async_scheduling": False},
        {"tensor_parallel_size": 2, "num_kvcache_blocks": 9},
    ],
    ids=["preemption", "micro-batches", "no look-ahead", "two ranks"],
)
def test_tokens_are_the_same_whatever_the_engine_does(expected, options):
    with LLM(**{**OPTIONS, "max_model_len": 128, **options}) as llm:
        if "num_kvcache_blocks" not in options:
            assert mixed(llm) == expected
            return
        results = mixed(llm)
        assert llm.scheduler.num_preemptions > 0
        # Where the blocks are too few for the whole of a request, it is shorter.
        for (tokens, reason), (right, whole) in zip(results, expected, strict=True):
            assert tokens == right[: len(tokens)]
            assert reason in (whole, "length")


class OddShape(Shape):
    """A vocabulary larger than the tokenizer's; several ranks have a part of it."""

    def config(self) -> Qwen3Config:
        config = super().config()
        config.vocab_size = 2 * SAMPLE_TILE + 77
        return config


def test_tokens_without_text_are_never_drawn_on_any_rank(tmp_path):
    OddShape(seed=4).write(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINT_DIR / name, tmp_path / name)
    said = []
    for ranks in (1, 2):
        with LLM(str(tmp_path), device="cpu", tensor_parallel_size=ranks) as llm:
            special, size = set(llm.tokenizer.all_special_ids), len(llm.tokenizer)
            outputs = llm.generate(
                list(PROMPTS) * 4,  # so that masks take more than the first packet of a step
                json_schema={"type": "string", "maxLength": 20},
                max_tokens=100,
                seed=5,
                use_tqdm=False,
            )
        for output in outputs:
            *tokens, last = output["token_ids"]
            assert last in llm.eos_ids
            assert output["finish_reason"] == "stop"
            assert not special & set(tokens)
            assert max(tokens) < size
            assert len(json.loads(output["text"])) <= 20
        said.append([output["token_ids"] for output in outputs])
    assert said[0] == said[1]


def count_ahead(llm: LLM, params: list[SamplingParams]) -> tuple[int, int, set[int]]:
    """Launches, those before the tokens of the step before, and whose rows were in the latter."""
    launched: list[int] = []
    rows: set[int] = set()
    in_flight = 0

    def watch(moment, step):
        nonlocal in_flight
        if moment == "begin":
            launched.append(in_flight)
            if in_flight:
                rows.update(chunk.seq.request_id for chunk in step.chunks)
            in_flight += 1
        in_flight -= moment == "tokens"

    before, llm.model_runner.watch = llm.model_runner.watch, watch
    ids = [llm.add_request(PROMPTS[i], each) for i, each in enumerate(params)]
    drain(llm)
    llm.model_runner.watch = before
    return len(launched), sum(map(bool, launched)), {ids.index(i) for i in rows}


def test_plain_rows_run_ahead_and_the_others_go_along_in_every_other_step(engine):
    plain = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    steps, ahead, _ = count_ahead(engine, [plain])
    assert (steps, ahead) == (40, 39)
    asking = SamplingParams(regex="[a-z]+", max_tokens=10, seed=1)
    mixed_steps, mixed_ahead, rows = count_ahead(engine, [plain, asking])
    assert (mixed_steps, mixed_ahead) == (steps, ahead)
    assert rows == {0, 1}
    _, ahead, _ = count_ahead(engine, [asking, asking])
    assert ahead == 0


def test_max_tokens_ends_a_completion_and_ignore_eos_does_not_keep_one_going(engine):
    (cut,) = engine.generate("x", json_schema=SCHEMA, max_tokens=5, use_tqdm=False)
    assert (cut["finish_reason"], len(cut["token_ids"])) == ("length", 5)
    (whole,) = engine.generate("x", regex="yes|no", ignore_eos=True, use_tqdm=False)
    assert whole["finish_reason"] == "stop"
    assert whole["text"] in ("yes", "no")


def test_special_tokens_are_no_text_even_where_their_letters_would_do(engine):
    matcher = engine.grammars.matcher(SamplingParams(regex=r"[a-z_<>|]{1,40}"))
    bits = np.zeros((1, engine.texts.vocab_size // 32), np.int32)
    matcher.fill_next_token_bitmask(bits)
    allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
    special = engine.tokenizer.all_special_ids
    assert {re.fullmatch("[a-z_<>|]+", engine.tokenizer.decode([i])) for i in special} != {None}
    assert not set(special) & set(allowed)
    assert all(re.fullmatch("[a-z_<>|]+", engine.tokenizer.decode([i])) for i in allowed)


LONG = [
    *({"regex": regex} for regex in (
        '[ -!#-~\u0400-\u04ff]{2,130}"', r'[ -\u04ff]{2,130}"', r"[^\n\"]{2,130}\"",
    )),
    *({"json_schema": {"type": "string", "minLength": least, "maxLength": most}}
      for least, most in ((0, 500), (2, 130), (20, 1000), (100, 101), (129, 129), (250, 10**6))),
    {"json_schema": {"type": "string", "minLength": 129}},
]  # fmt: skip


@pytest.mark.parametrize("structure", LONG, ids=str)
def test_every_token_that_is_allowed_is_accepted(engine, structure):
    for seed in range(2):
        assert not refused_tokens(engine, SamplingParams(**structure), steps=100, seed=seed)


MEMBERS = [
    "a", "^", "z", r"\]", r"\[", "é", "a-f", "\u0400-\u04ff", "x-\u00ff", r"\d", r"\w", r"\x41",
    r"\u00e9", r"\u0030-\x39", " ", "\U0001f600", r"\n", ".", "+", r"\\", r"\x5d", r"\x2d",
]  # fmt: skip
OTHERS = "b-\u0401gy~\x7f\x80ÿA0_\nĀ"


@pytest.mark.parametrize("seed", range(20))
def test_a_class_has_the_characters_that_it_has_in_a_regex(engine, seed):
    """Python's, with classes of ASCII; xgrammar alone takes what follows a code for more of it."""
    members = random.Random(seed).sample(MEMBERS, 4)
    pattern = f"[b{''.join(members)}]"
    params = SamplingParams(regex=pattern + "{1,2}")
    for character in {*OTHERS, *"".join(members)}:
        expected = re.fullmatch(pattern, character, re.ASCII) is not None
        assert engine.grammars.matcher(params).accept_string(character) == expected, character


@pytest.mark.parametrize(
    ("regex", "text"),
    [(r"\u00e9a", "éa"), (r"\x41b", "Ab"), (r"\x2e\x5b9", ".[9"), (r"\\x41", r"\x41")],
)
def test_a_code_ends_where_it_ends(engine, regex, text):
    matcher = engine.grammars.matcher(SamplingParams(regex=regex))
    assert matcher.accept_string(text)
    assert matcher.is_completed()


def test_a_dot_is_no_line_break(engine):
    matcher = engine.grammars.matcher(SamplingParams(regex="(.a)+"))
    assert matcher.accept_string("éa")
    assert not matcher.accept_string("\na")


OPTIONAL = [
    ({"pattern": "^x(-[a-z]+)?$"}, ["x", "x-ab"], ["xa", "x-", "xab"]),
    ({"pattern": "^(a*b)?(?<n>c{2,})??$"}, ["", "b", "aab", "cc", "bccc"], ["a", "aa", "c", "ac"]),
    ({"pattern": "^((ab)*%)?a?$"}, ["", "%", "abab%", "a", "%a"], ["ab", "abab", "aba"]),
    ({"format": "time"}, ["10:00:00Z", "10:00:00.5Z"], ["10:00:005Z", "10:00:00.Z"]),
    ({"format": "date-time"}, ["2020-01-01T10:00:00.5Z"], ["2020-01-01T10:00:0012Z"]),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), OPTIONAL)
def test_an_optional_part_of_a_string_is_whole_or_not_there(engine, schema, right, wrong):
    params = SamplingParams(json_schema={"type": "string", **schema})
    engine.grammars.check(params)
    for text in right + wrong:
        matcher = engine.grammars.matcher(params)
        follows = matcher.accept_string(json.dumps(text)) and matcher.accept_token(
            min(engine.eos_ids)
        )
        assert follows == (text in right), text


REFUSED = [
    ({"regex": "a(?=b)"}, "regex='a.*Lookahead is not supported"),
    ({"regex": "["}, r"regex='\['.*Unclosed"),
    ({"regex": "\ud800"}, "regex=.*surrogates"),
    ({"regex": r"\ud83d\ude00"}, r"regex=.*without \\ud83d: surrogates"),
    ({"regex": r"[\u{d7ff}-\ue000]"}, r"regex=.*without \\u{d7ff}-\\ue000: surrogates"),
    ({"regex": "[\ud7ff-\ue000]"}, "regex=.*surrogates"),
    ({"regex": r"\u{110000}"}, r"regex=.*without \\u\{110000\}.*U\+10FFFF"),
    ({"grammar": r'root ::= "\U00110000"'}, r"grammar=.*U\+10FFFF"),
    ({"regex": r"[\^a]"}, "regex=.*at the beginning of a class"),
    ({"grammar": r'root ::= "\ud800"'}, "grammar=.*surrogates"),
    ({"grammar": "root ::= other"}, 'grammar=.*"other" is not defined'),
    ({"grammar": "root ::= root"}, "grammar=.*no text can follow it"),
    ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "json_schema=.*range"),
    ({"json_schema": {"$ref": "#"}}, "json_schema=.*no text"),
]


@pytest.mark.parametrize(("fields", "match"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_does_not_compile_is_refused_and_the_engine_goes_on(engine, fields, match):
    with pytest.raises(ValueError, match=match):
        engine.add_request("x", **fields)
    with pytest.raises(ValueError, match=match):
        engine.generate(["y", "x"], [SamplingParams(), SamplingParams(**fields)], use_tqdm=False)
    assert engine.is_finished()
    (output,) = engine.generate("x", regex="yes", use_tqdm=False)
    assert output["text"] == "yes"


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    with LLM(**OPTIONS) as llm:
        with pytest.raises(ValueError, match=r"regex.* need .*xgrammar: pip .*\[structured\]"):
            llm.generate("x", regex="a", use_tqdm=False)
        assert llm.generate("x", max_tokens=1, use_tqdm=False)


def test_an_engine_without_a_tokenizer_refuses(tmp_path):
    Shape().write(tmp_path)
    with (
        LLM(str(tmp_path), device="cpu") as llm,
        pytest.raises(ValueError, match=r"regex='a' is not allowed: .* has no tokenizer"),
    ):
        llm.generate([[5]], regex="a", use_tqdm=False)


@pytest.mark.parametrize("eos", [-1, 5000, 2**63])
@pytest.mark.parametrize("ends", [True, False])
def test_an_end_of_sequence_token_outside_the_vocabulary_is_none(tmp_path, eos, ends):
    directory = tmp_path / "model"
    shutil.copytree(CHECKPOINT_DIR, directory)
    for name, field, value in (
        ("generation_config.json", "eos_token_id", [eos]),
        ("config.json", "eos_token_id", 1 if ends else None),
        ("tokenizer_config.json", "eos_token", "<|im_end|>" if ends else None),
    ):
        fields = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**fields, field: value}))
    with LLM(directory, **OPTIONS) as llm:
        if ends:
            (output,) = llm.generate("x", regex="ab", use_tqdm=False)
            assert (output["text"], output["finish_reason"]) == ("ab", "stop")
        else:
            with pytest.raises(ValueError, match=r"regex='ab' .* has no end-of-sequence token"):
                llm.generate("x", regex="ab", use_tqdm=False)


def test_compiled_grammars_are_shared_and_bounded(engine):
    compiled = engine.grammars._compiled
    compiled.cache_clear()
    for i in [*range(grammars.KEPT + 5), grammars.KEPT]:
        engine.add_request("x", regex=f"a{i}", max_tokens=1)
    assert compiled.cache_info().currsize == grammars.KEPT
    assert compiled.cache_info().misses == grammars.KEPT + 5
    drain(engine)


def test_tokens_are_right_after_an_interrupt_at_any_line(engine):
    params = [MIXED[2], replace(MIXED[0], max_tokens=12), replace(MIXED[3], max_tokens=9)]

    def play(line: int) -> tuple[list[list[int]], int]:
        """What is said if an interrupt comes before that line of steps; the lines executed."""
        ids = [engine.add_request(PROMPTS[i], each) for i, each in enumerate(params)]
        said = {}
        with contextlib.suppress(Interrupt), InterruptAt(line, paths) as lines:
            for output in steps(engine):
                said[output["request_id"]] = output["token_ids"]
        assert lines.reached
        said |= drain(engine)
        return [said[i] for i in ids], lines.executed

    names = ["engine.scheduler", "engine.sequence", "structured.grammars"]
    paths = [str(sys.modules[f"nanovllm.{name}"].__file__) for name in names]
    right, executed = play(0)
    for line in random.sample(range(1, executed), 12):
        assert play(line)[0] == right, line
