"""The engine as its users see it: requests in, completions out."""

import json
import shutil
import time
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

from nanovllm import LLM, Config, LLMEngine, SamplingParams
from nanovllm.engine.outputs import Completion, RequestOutput
from nanovllm.tiny import CHECKPOINT_DIR
from tests.checkpoints import VOCAB
from tests.engine.cases import (
    GREEDY,
    OPTIONS,
    PROMPTS,
    check_empty,
    drain,
    said,
    scheduled,
    steps,
    tokens,
    whatever_the_scheduler_does,
)

# ------------------------------------------------------------------ making an engine


def test_all_ways_to_make_an_engine_are_equal(directory, expected):
    config = Config(str(directory), **OPTIONS)
    makers = [
        lambda: LLM(directory, **OPTIONS),
        lambda: LLM(model=str(directory), **OPTIONS),
        lambda: LLMEngine(config),
    ]
    for make in makers:
        with make() as engine:
            assert engine.config == config
            assert tokens(engine.generate(PROMPTS, GREEDY, use_tqdm=False)) == expected


def test_an_option_overrides_the_config_and_leaves_it_as_it_was(directory):
    config = Config(str(directory), **OPTIONS)
    with LLMEngine(config, max_num_seqs=3) as engine:
        assert engine.config == replace(config, max_num_seqs=3)
        assert engine.scheduler.max_num_seqs == 3
    assert config.max_num_seqs == 512


@pytest.mark.parametrize("kind", [str, Config])
def test_a_bad_option_is_refused(directory, kind):
    with pytest.raises(TypeError, match=r"^Config has no option 'max_seqs'; .* 'max_num_seqs'$"):
        LLM(kind(str(directory)), max_seqs=4)
    with pytest.raises(ValueError, match=r"^max_num_seqs=0 is not allowed: it must be an integer"):
        LLM(kind(str(directory)), max_num_seqs=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_run_on_the_cpu(directory, dtype):
    with LLM(str(directory), dtype=dtype, **OPTIONS) as engine:
        assert engine.model_runner.model.model.norm.weight.dtype == getattr(torch, dtype)
        outputs = engine.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [len(ids) for ids in tokens(outputs)] == [8] * 4


def test_the_models_own_limit_caps_max_model_len(directory):
    with LLM(str(directory), device="cpu", max_model_len=4096) as engine:
        with pytest.raises(ValueError, match="has 257 tokens, but max_model_len allows 256"):
            engine.add_request([5] * 257)
        assert len(engine.generate([[5] * 256], use_tqdm=False)[0]["token_ids"]) == 1


# ------------------------------------------------------------------ prompts and completions


def test_completions_are_in_order_and_say_when_they_came(llm, expected):
    start = time.perf_counter()
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    end = time.perf_counter()
    assert [set(output) for output in outputs] == [set(get_type_hints(Completion))] * 4
    assert [(o["index"], o["sample"], o["stop_reason"]) for o in outputs] == [
        (i, 0, None) for i in range(4)
    ]
    assert [output["prompt_token_ids"] for output in outputs] == PROMPTS
    for output in outputs:
        times = [start, *map(output.get, ("queued_time", "first_token_time", "end_time")), end]
        assert times == sorted(times)
    assert tokens(outputs) == expected
    assert len({tuple(ids) for ids in expected}) == 4
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert tokens(llm.generate([prompt], GREEDY, use_tqdm=False)) == [ids]


def test_order_is_that_of_the_prompts_although_the_last_finish_first(llm, expected):
    params = [replace(GREEDY, max_tokens=count) for count in (8, 6, 4, 1)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert tokens(outputs) == [ids[:n] for ids, n in zip(expected, (8, 6, 4, 1), strict=True)]
    assert {output["finish_reason"] for output in outputs} == {"length"}
    assert {output["text"] for output in outputs} == {""}  # there is no tokenizer


def test_no_prompts_no_completions(llm):
    assert llm.generate([], use_tqdm=False) == []
    assert llm.generate([], [], use_tqdm=False) == []


def mixed_ints(ids: list[int]) -> list:
    """Python's integers but for the last."""
    return [*ids[:-1], np.int32(ids[-1])]


def scalars(ids: list[int]) -> list:
    """Tensors and arrays without a dimension, each an integer."""
    return [make(token) for make, token in zip(cycle((torch.tensor, np.array)), ids, strict=False)]


@pytest.mark.parametrize("kind", [tuple, iter, torch.tensor, np.array, mixed_ints, scalars])
def test_token_ids_may_come_in_any_sequence(llm, expected, kind):
    given = [kind(prompt) for prompt in PROMPTS]
    assert tokens(llm.generate(given, GREEDY, use_tqdm=False)) == expected
    outputs = llm.generate(iter(PROMPTS), GREEDY, use_tqdm=False)
    assert tokens(outputs) == expected


def test_a_prompt_is_a_text_its_token_ids_or_a_dict_of_either_alone_or_in_a_list(tiny):
    text, params = "Once upon a time", SamplingParams(temperature=0, max_tokens=20)
    one = tiny.generate(text, params, use_tqdm=False)
    ids = tiny.tokenizer.encode(text)
    dicts = [{"prompt": text}, {"prompt_token_ids": tuple(ids)}]
    for given in ([text], (text,), [ids], [tuple(ids)], [torch.tensor(ids)], *dicts):
        assert said(tiny.generate(given, params, use_tqdm=False)) == said(one)
    for given in dicts:
        tiny.add_request(given, params)
    assert said(tiny.generate([ids, *dicts, text], params, use_tqdm=False)) == said(one) * 4
    assert list(drain(tiny).values()) == tokens(one) * 2


def test_the_text_is_the_decoded_token_ids_without_special_tokens(tiny):
    (output,) = tiny.generate("The little fox", temperature=0, max_tokens=300, use_tqdm=False)
    assert output["finish_reason"] == "stop"
    assert output["token_ids"][-1] == tiny.tokenizer.eos_token_id
    assert output["text"] == tiny.tokenizer.decode(output["token_ids"][:-1])


@pytest.mark.parametrize(
    ("options", "shown"), [({"use_tqdm": True}, True), ({"use_tqdm": False}, False), ({}, True)]
)
def test_the_progress_bar_is_shown_unless_switched_off(llm, capsys, options, shown):
    llm.generate(PROMPTS, GREEDY, **options)
    err = capsys.readouterr().err
    assert all((word in err) == shown for word in ("Generating", "4/4", "tokens/s"))


# ------------------------------------------------------------------ where a request ends


def first_new(ids: list[int]) -> int:
    """An index at which a token comes for the first time, but not the first index."""
    return next(i for i in range(2, len(ids)) if ids[i] not in ids[:i])


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_stop_token_ends_a_request_and_is_its_last_token(llm, expected, room):
    """Also where the length would end it."""
    ids = expected[0]
    end = first_new(ids)
    params = replace(GREEDY, stop_token_ids=(VOCAB + 7, ids[end]), max_tokens=end + 1 + room)
    (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    assert (output["token_ids"], output["finish_reason"]) == (ids[: end + 1], "stop")


@pytest.mark.parametrize("source", ["config.json", "generation_config.json", "both"])
def test_an_eos_token_of_either_file_ends_a_request(directory, tmp_path, expected, source):
    copy = Path(shutil.copytree(directory, tmp_path / "model"))
    ids = expected[0]
    end = first_new(ids)
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((copy / name).read_text())
        here = source in (name, "both")
        fields["eos_token_id"] = [VOCAB - 1, ids[end]] if here else None
        (copy / name).write_text(json.dumps(fields))
    with LLM(str(copy), **OPTIONS) as engine:
        assert engine.eos_ids == {VOCAB - 1, ids[end]}
        params = SamplingParams(temperature=0, max_tokens=8)
        (output,) = engine.generate([PROMPTS[0]], params, use_tqdm=False)
        assert (output["token_ids"], output["finish_reason"]) == (ids[: end + 1], "stop")
        (output,) = engine.generate([PROMPTS[0]], GREEDY, use_tqdm=False)  # ignores it
        assert (output["token_ids"], output["finish_reason"]) == (ids, "length")


def test_the_eos_token_of_the_tokenizer_counts_too(tmp_path, tiny):
    copy = Path(shutil.copytree(CHECKPOINT_DIR, tmp_path / "model"))
    (copy / "generation_config.json").unlink()
    fields = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**fields, "eos_token_id": 1000}))
    with LLM(str(copy), device="cpu") as engine:
        assert engine.eos_ids == {1000, tiny.tokenizer.eos_token_id}


@pytest.mark.parametrize(("limit", "options"), [(64, {}), (32, {"num_kvcache_blocks": 2})])
@pytest.mark.parametrize("max_tokens", [500, None])
def test_max_model_len_and_the_kv_cache_end_a_request(directory, limit, options, max_tokens):
    with LLM(str(directory), **OPTIONS, **options) as engine:
        params = replace(GREEDY, max_tokens=max_tokens)
        for length in (1, limit - 2, limit - 1, limit):
            (output,) = engine.generate([[7] * length], params, use_tqdm=False)
            assert len(output["token_ids"]) == max(limit - length, 1)
            assert output["finish_reason"] == "length"
            check_empty(engine)


# ------------------------------------------------------------------ sampling


SEEDED = [SamplingParams(seed=11 + i, max_tokens=12, ignore_eos=True) for i in range(4)]


@pytest.fixture(scope="module")
def seeded(shared) -> list[list[int]]:
    return [
        tokens(shared.generate([prompt], params, use_tqdm=False))[0]
        for prompt, params in zip(PROMPTS, SEEDED, strict=True)
    ]


@whatever_the_scheduler_does
def test_a_seed_gives_the_same_tokens_whatever_else_is_going_on(directory, seeded, options):
    with scheduled(directory, options) as engine:
        others = [[9, 8, 7]] * 3
        params = [*SEEDED, *[SamplingParams(max_tokens=20)] * 3]
        outputs = engine.generate(PROMPTS + others, params, use_tqdm=False)
        assert tokens(outputs)[:4] == seeded
        outputs = engine.generate(PROMPTS[::-1], SEEDED[::-1], use_tqdm=False)
        assert tokens(outputs)[::-1] == seeded


def test_tokens_vary_with_the_seed_and_without_one(llm, seeded):
    params = [replace(params, seed=params.seed + 1000) for params in SEEDED]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert all(ours != theirs for ours, theirs in zip(tokens(outputs), seeded, strict=True))
    params = SamplingParams(temperature=3, max_tokens=12, ignore_eos=True)
    outputs = llm.generate([PROMPTS[0]] * 5, params, use_tqdm=False)
    assert len({tuple(ids) for ids in tokens(outputs)}) == 5


def test_each_token_of_a_request_is_drawn_anew(llm):
    """At this temperature all tokens are about as likely, so equal noise would repeat one."""
    params = SamplingParams(temperature=100, seed=3, max_tokens=30, ignore_eos=True)
    (output,) = llm.generate([PROMPTS[0]], params, use_tqdm=False)
    assert len(set(output["token_ids"])) > 20


# ------------------------------------------------------------------ request by request


def test_requests_step_by_step(llm, expected):
    assert llm.is_finished()
    assert llm.step() == []
    ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
    assert ids == sorted(set(ids))
    assert not llm.is_finished()
    outputs = list(steps(llm))
    assert [set(output) for output in outputs] == [set(get_type_hints(RequestOutput))] * 4
    assert {(output["index"], output["sample"]) for output in outputs} == {(0, 0)}
    assert {out["request_id"]: out["token_ids"] for out in outputs} == dict(
        zip(ids, expected, strict=True)
    )


@pytest.mark.parametrize("count", [0, 1, 3])
def test_abort_drops_a_request_and_no_other(llm, expected, count):
    ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]
    for _ in range(count):
        assert llm.step() == []
    assert llm.abort(ids[1]) is True
    assert llm.abort(ids[1]) is False
    assert drain(llm) == {ids[i]: expected[i] for i in (0, 2, 3)}
    assert llm.abort(ids[0]) is False  # it has finished


def test_abort_of_the_last_request_leaves_the_engine_idle(llm):
    request = llm.add_request(PROMPTS[0], GREEDY)
    llm.step()
    assert llm.abort(request) is True
    assert llm.is_finished()
    assert llm.step() == []


def test_abort_of_an_unknown_request_is_an_error(llm):
    for unknown in (-1, llm.next_request_id, llm.next_request_id + 5, 0.0, True, None):
        with pytest.raises(KeyError, match=f"request_id={unknown} is unknown: ids so far are bel"):
            llm.abort(unknown)


def test_generate_does_not_swallow_requests_that_were_added_before(llm, expected):
    before = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS[:2]]
    outputs = llm.generate(PROMPTS[2:], replace(GREEDY, max_tokens=20), use_tqdm=False)
    assert [ids[:8] for ids in tokens(outputs)] == expected[2:]
    assert not llm.is_finished()
    assert drain(llm) == dict(zip(before, expected[:2], strict=True))


def test_computed_requests_may_take_every_block(directory):
    options = {**OPTIONS, "enable_prefix_caching": False, "num_kvcache_blocks": 6}
    with LLM(str(directory), **options, max_num_seqs=3) as engine:
        token_ids = [5] * 17
        for _ in range(3):
            engine.add_computed_request(token_ids, GREEDY)
        for length in (1, 17):
            with pytest.raises(ValueError, match=f"a computed request of {length} tokens has no"):
                engine.add_computed_request([5] * length, GREEDY)
        assert [len(ids) for ids in drain(engine).values()] == [8, 8, 8]
        assert token_ids == [5] * 17
        check_empty(engine)
