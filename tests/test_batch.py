"""`python -m nanovllm.batch`: answers, refusals, and jobs that are killed and go on."""

import json
import math
import re
import shlex
import time
from contextlib import closing
from pathlib import Path

import pytest

from nanovllm import LLM, Logprob, SamplingParams
from nanovllm.batch import lines
from nanovllm.batch.__main__ import main, parse_arguments
from nanovllm.batch.logprobs import chat_form, prompt_form, text_form
from nanovllm.batch.results import Results
from nanovllm.engine.parallel.processes import RankDiedError
from nanovllm.tiny import CHECKPOINT_DIR
from tests import batch_jobs, scripts
from tests.batch_jobs import TEMPLATE, arguments, read, request, stories, write
from tests.bench_runs import refusal

README = Path(__file__).parents[1] / "README.md"
TEXT = "Once upon a time"
GREEDY = {"temperature": 0, "max_tokens": 6}
CHAT = [{"role": "user", "content": TEXT}]
# What clients of OpenAI send along, and what changes nothing.
NEUTRAL = {
    "store": True, "service_tier": "auto", "safety_identifier": "u", "prompt_cache_key": "k",
    "suffix": "", "tools": [], "tool_choice": "none", "parallel_tool_calls": True,
    "modalities": ["text"], "user": "u", "metadata": {"a": "b"},
}  # fmt: skip


def run(tmp_path: Path, given: list[object], *more: object) -> list[dict]:
    """The results of requests, in the order of their lines."""
    source = write(tmp_path / "in.jsonl", given)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    main(arguments(source, tmp_path / "out.jsonl", "--chat-template", template, *more))
    order = {line.key: line.number for line in lines.read_lines(source)}
    return sorted(read(tmp_path / "out.jsonl"), key=lambda result: order[key(result)])


def key(result: dict) -> str | int:
    return result["custom_id"] or result["error"]["line"]


def test_results_are_completion_objects_of_what_the_engine_says(tmp_path):
    plain, chat, ids, stopped = run(
        tmp_path,
        [
            request("a", model="gpt", prompt=TEXT, **GREEDY),
            "",
            request("b", messages=CHAT, max_completion_tokens=6, temperature=0, n=1, stop=None),
            request("ü", prompt=[5, 6, 7], stream=False, seed=3, max_tokens=3, **NEUTRAL),
            request("stop", prompt=TEXT, stop=[",", "\n"], temperature=0),
        ],
    )
    with LLM(device="cpu") as llm:
        (expected,) = llm.generate(TEXT, **GREEDY, use_tqdm=False)
        (answer,) = llm.chat(CHAT, chat_template=TEMPLATE, **GREEDY, use_tqdm=False)
        (third,) = llm.generate([[5, 6, 7]], seed=3, max_tokens=3, use_tqdm=False)
    for result, kind in ((plain, "text_completion"), (chat, "chat.completion")):
        assert list(result) == ["id", "custom_id", "response", "error"]
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        assert result["response"]["request_id"]
        body = result["response"]["body"]
        assert body["object"] == kind
        assert body["model"] == str(CHECKPOINT_DIR)
        assert abs(body["created"] - time.time()) < 600
        assert len(body["choices"]) == 1
        assert body["choices"][0]["index"] == 0
        assert body["choices"][0]["finish_reason"] == expected["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 6
        assert body["usage"]["total_tokens"] == 6 + body["usage"]["prompt_tokens"]
    assert plain["response"]["body"]["choices"][0]["text"] == expected["text"]
    message = chat["response"]["body"]["choices"][0]["message"]
    assert message == {"role": "assistant", "content": answer["text"]}
    (choice,) = stopped["response"]["body"]["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["stop_reason"] == ","
    assert ids["custom_id"] == "ü"
    assert ids["response"]["body"]["choices"][0]["text"] == third["text"]
    assert ids["response"]["body"]["usage"]["prompt_tokens"] == 3
    assert len({result["id"] for result in (plain, chat, ids)}) == 3


def test_samples_are_the_choices_of_one_answer(tmp_path):
    """More than the engine takes at a time, so that lines wait for all of their samples."""
    count = 128
    many = request("many", prompt=TEXT, n=count, temperature=1, seed=3, max_tokens=2)
    two = request("two", messages=CHAT, n=2, temperature=1, seed=3, max_tokens=3)
    given = [many, two, many | {"custom_id": "again"}]
    results = {
        result["custom_id"]: result for result in run(tmp_path, given, "--max-num-seqs", "16")
    }
    with LLM(device="cpu") as llm:
        right = llm.generate(TEXT, n=count, temperature=1, seed=3, max_tokens=2, use_tqdm=False)
        answers = llm.chat(
            CHAT, n=2, temperature=1, seed=3, max_tokens=3, chat_template=TEMPLATE, use_tqdm=False
        )
    for key in ("many", "again"):
        body = results[key]["response"]["body"]
        assert [choice["index"] for choice in body["choices"]] == list(range(count))
        assert [choice["text"] for choice in body["choices"]] == [each["text"] for each in right]
        prompt_tokens = len(right[0]["prompt_token_ids"])
        tokens = sum(len(each["token_ids"]) for each in right)
        assert body["usage"]["total_tokens"] == prompt_tokens + tokens
        assert body["usage"]["completion_tokens"] == tokens
    choices = results["two"]["response"]["body"]["choices"]
    assert [choice["message"]["content"] for choice in choices] == [x["text"] for x in answers]


def test_log_probabilities_are_in_openais_forms(tmp_path):
    asked = {"logprobs": 2, "prompt_logprobs": 1}
    plain, chat, few, none = run(
        tmp_path,
        [
            request("plain", prompt=TEXT, **asked, **GREEDY),
            request("chat", messages=CHAT, logprobs=True, top_logprobs=2, **GREEDY),
            request("few", messages=CHAT, logprobs=True, **GREEDY),
            request("none", messages=CHAT, logprobs=False, top_logprobs=0, **GREEDY),
        ],
    )
    with LLM(device="cpu") as llm:
        (right,) = llm.generate(TEXT, **asked, **GREEDY, use_tqdm=False)
    (choice,) = plain["response"]["body"]["choices"]
    said = choice["logprobs"]
    assert "".join(said["tokens"]) == right["text"] == choice["text"]
    for offset, token in zip(said["text_offset"], said["tokens"], strict=True):
        assert choice["text"][offset:].startswith(token)
    (choice,) = chat["response"]["body"]["choices"]
    (short,) = few["response"]["body"]["choices"]
    for i, place in enumerate(right["logprobs"]):
        own = place[right["token_ids"][i]]
        top = {each.decoded_token: each.logprob for each in place.values()}
        assert said["tokens"][i] == own.decoded_token
        assert said["token_logprobs"][i] == pytest.approx(own.logprob, abs=1e-4)
        assert said["top_logprobs"][i] == pytest.approx(top, abs=1e-4)
        entry = choice["logprobs"]["content"][i]
        assert entry["token"] == own.decoded_token
        assert bytes(entry["bytes"]).decode() == own.decoded_token
        likeliest = {each["token"]: each["logprob"] for each in entry["top_logprobs"]}
        assert likeliest == pytest.approx(top, abs=1e-4)
        alone = short["logprobs"]["content"][i]
        assert (alone["token"], alone["top_logprobs"]) == (own.decoded_token, [])
    places = plain["response"]["body"]["choices"][0]["prompt_logprobs"]
    for place, own in zip(places[1:], right["prompt_logprobs"][1:], strict=True):
        assert {int(token): each["rank"] for token, each in place.items()} == {
            token: each.rank for token, each in own.items()
        }
    assert places[0] is None
    assert none["response"]["body"]["choices"][0]["logprobs"] is None


def test_forms_hold_no_infinity_and_need_no_tokenizer():
    places = [{7: Logprob(-math.inf, 9), 5: Logprob(-0.5, 1)}]
    assert text_form([7], places) == {
        "tokens": ["token_id:7"],
        "token_logprobs": [-9999.0],
        "top_logprobs": [{"token_id:7": -9999.0, "token_id:5": -0.5}],
        "text_offset": [0],
    }
    (entry,) = chat_form([7], places, 1)["content"]
    assert entry["logprob"] == -9999.0
    assert [each["token"] for each in entry["top_logprobs"]] == ["token_id:5"]
    assert prompt_form([None, *places]) == [
        None,
        {
            7: {"logprob": -9999.0, "rank": 9, "decoded_token": None},
            5: {"logprob": -0.5, "rank": 1, "decoded_token": None},
        },
    ]


def test_response_format_is_what_the_answer_follows(tmp_path):
    pytest.importorskip("xgrammar", reason="structured output needs xgrammar")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    formats = [
        {"type": "json_schema", "json_schema": {"name": "one", "schema": schema, "strict": True}},
        {"type": "text"},
        {"type": "json_object"},
    ]
    given = [
        request(str(i), prompt=TEXT, seed=1, max_tokens=60, response_format=each)
        for i, each in enumerate(formats)
    ]
    results = run(tmp_path, given)
    followed, plain, some_object = (result["response"]["body"]["choices"][0] for result in results)
    assert json.loads(followed["text"])["a"] in ("x", "y")
    assert followed["finish_reason"] == "stop"
    assert not plain["text"].lstrip().startswith("{")
    assert some_object["text"].startswith("{")


def nested(levels: int) -> str:
    """A request with lists in lists."""
    return json.dumps(request("deep", prompt="x"))[:-1] + f', "a": {"[" * levels}{"]" * levels}}}'


BAD_LINES = [
    ("{", "no JSON"),
    ("[1]", "no JSON object"),
    ("[" * 100_000, "no JSON"),
    *((nested(levels), "levels of JSON|no JSON") for levels in (100, 500, *range(900, 1000, 10))),
    (request("bias", prompt="x", logit_bias={"1": -(10**400)}), "logit_bias=.*-inf to 1e6"),
    (request(None, prompt="x"), "custom_id=None"),
    (request(5, prompt="x"), "custom_id=5"),
    ({**request("get", prompt="x"), "method": "GET"}, "method='GET' .* 'POST'"),
    ({**request("url", prompt="x"), "url": "/v1/embeddings"}, "url='/v1/embeddings' .*completions"),
    ({**request("list", prompt="x"), "body": [1]}, r"body=\[1\]"),
    ({**request("mixed", messages=CHAT), "url": "/v1/completions"}, "no 'prompt'"),
    ({**request("other", prompt="x"), "url": "/v1/chat/completions"}, "no 'messages'"),
    (request("empty", prompt=""), "prompt is empty"),
    (request("surrogate", prompt="\ud800"), "cannot be encoded.*surrogates"),
    (request("long", prompt=[5] * 5000), "5000 tokens.*max_model_len"),
    (request("texts", prompt=["a", "b"]), "neither a text nor a list of token ids"),
    (request("id", prompt=[10**9]), "vocabulary"),
    (request("message", messages=[{"role": "user", "content": 5}]), r"messages\[0\]"),
    (request("kwargs", messages=CHAT, chat_template_kwargs=5), "chat_template_kwargs=5"),
    (request("plain", prompt="x", add_generation_prompt=True), "add_generation_prompt is for"),
    (request("top_p", prompt="x", top_p=2), "top_p=2.*above 0"),
    (request("unknown", prompt="x", temprature=1), "'temprature'.*'temperature'"),
    (request("n", prompt="x", n=0), "n=0 is not allowed"),
    (request("choices", prompt="x", n=10**9), "n=1000000000 is not allowed.*from 1 to 128"),
    (request("stop", prompt="x", stop=["a", ""]), r"stop=\['a', ''\] is not allowed.*texts"),
    (request("stream", prompt="x", stream=True), "stream=True"),
    (request("logprobs", prompt="x", logprobs=True), "logprobs=True .*from 0 to 20"),
    (request("chat", messages=CHAT, logprobs=3), "logprobs=3 .*True or False"),
    (request("top", messages=CHAT, top_logprobs=3), "top_logprobs=3 .*without logprobs"),
    (request("most", messages=CHAT, logprobs=True, top_logprobs=21), "^top_logprobs=21 .*to 20"),
    (request("format", prompt="x", response_format={"type": "xml"}), "response_format=.*'text'"),
    (
        request(
            "null",
            prompt="x",
            response_format={"type": "json_schema", "json_schema": {"schema": None}},
        ),
        "response_format=.*'schema': None",
    ),
    (request("self", prompt="x", self=1), "no option 'self'"),
    (
        request(
            "schema",
            prompt="x",
            response_format={"type": "json_schema", "json_schema": {"schema": {"not": {}}}},
        ),
        "json_schema=.*'not' at #",
    ),
    (request("both", prompt="x", max_tokens=1, max_completion_tokens=1), "not both"),
    (
        request("two", prompt="x", json_schema={}, response_format={"type": "json_object"}),
        "json_schema or response_format, not both",
    ),
]


def test_a_bad_line_gets_an_error_and_the_others_go_on(tmp_path):
    good = [request(f"good-{i}", prompt=TEXT, **GREEDY) for i in range(len(BAD_LINES))]
    bad = [line for line, _ in BAD_LINES]
    given = [line for pair in zip(good, bad, strict=True) for line in pair]
    # So few at a time that bad lines also come when requests run.
    results = run(tmp_path, given, "--max-num-seqs", "2")
    assert len({result["response"]["body"]["choices"][0]["text"] for result in results[::2]}) == 1
    for i, (result, (line, match)) in enumerate(zip(results[1::2], BAD_LINES, strict=True)):
        custom_id = line["custom_id"] if isinstance(line, dict) else None
        assert result["custom_id"] == (custom_id if isinstance(custom_id, str) else None)
        assert result["response"] is None
        assert result["error"]["line"] == 2 * i + 2
        assert result["error"]["code"] == "invalid_request"
        with pytest.raises(ValueError, match=match):
            raise ValueError(result["error"]["message"])
    # All are done now: nothing is added, and no model is loaded.
    before = (tmp_path / "out.jsonl").read_bytes()
    main(["--model", "/nowhere", *map(str, (tmp_path / "in.jsonl", tmp_path / "out.jsonl"))])
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_the_fields_of_openai_that_change_logits(tmp_path):
    """The keys of a JSON object are texts."""
    options = {"logit_bias": {"40": 100}, "presence_penalty": 2, "frequency_penalty": 2.0}
    changes = [options, {"logit_bias": {"40": -100}}, {"logit_bias": {"x": 1}}]
    bodies = [request(f"{i}", prompt=TEXT, **GREEDY, **each) for i, each in enumerate(changes)]
    *results, refused = run(tmp_path, bodies)
    with LLM(device="cpu") as llm:
        for result, each in zip(results, changes, strict=False):
            (expected,) = llm.generate(TEXT, **GREEDY, **each, use_tqdm=False)
            assert result["response"]["body"]["choices"][0]["text"] == expected["text"]
    assert "logit_bias={'x': 1} is not allowed" in refused["error"]["message"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_null_tokens_are_no_limit(tmp_path, field):
    nulls = {"max_tokens": None, "max_completion_tokens": None}
    bodies = [{field: None}, {**nulls, field: 5}, {"seed": None}]
    given = [
        request(str(i), prompt=TEXT, temperature=0, ignore_eos=True, **body)
        for i, body in enumerate(bodies)
    ]
    results = run(tmp_path, given, "--max-model-len", "100")
    usages = [result["response"]["body"]["usage"] for result in results]
    assert usages[0]["total_tokens"] == 100
    assert [usage["completion_tokens"] for usage in usages[1:]] == [5, SamplingParams().max_tokens]


def test_logits_that_are_not_numbers_are_the_servers_error():
    line = lines.parse(3, json.dumps(request("a", prompt="x")).encode())
    broken = {"text": "", "token_ids": [], "finish_reason": "error", "sample": 0}
    result = lines.answer_line(line, [broken], "model")
    assert result["response"] is None
    assert result["error"]["code"] == "server_error"


def test_all_of_openais_fixed_fields_are_unknown_to_the_engine():
    """Else the engine could do what is refused here."""
    assert not set(lines.FIXED) & set(vars(SamplingParams()))


def result_lines(*custom_ids: str) -> list[dict]:
    found = [lines.parse(i, json.dumps(request(id, prompt="x")).encode())
             for i, id in enumerate(custom_ids, start=1)]  # fmt: skip
    return [lines.error_line(line, "wrong") for line in found]


def test_a_job_that_cannot_be_is_refused_before_anything_is_loaded(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [request("a", prompt="x"), request("b", prompt="x")])
    twice = write(tmp_path / "twice.jsonl", [request("a", prompt="x"), "{", request("a")])
    other = write(tmp_path / "other.jsonl", result_lines("a", "c"))
    double = write(tmp_path / "double.jsonl", result_lines("a", "a"))
    damaged = write(tmp_path / "damaged.jsonl", ['{"id": "batch_req_5"}'])
    strange = write(tmp_path / "strange.jsonl", [{"id": "batch_req_5", "custom_id": [1]}])
    torn = tmp_path / "torn.jsonl"
    torn.write_text("no line end")
    latin = tmp_path / "latin.jinja"
    latin.write_bytes(b"caf\xe9")
    unended = tmp_path / "unended.jinja"
    unended.write_text("{% for")
    new = tmp_path / "new.jsonl"
    cases = [
        ((twice, new), ["lines 1 and 3", "custom_id 'a'"]),
        ((tmp_path / "none.jsonl", new), ["none.jsonl"]),
        ((source, tmp_path), [str(tmp_path)]),
        ((source, tmp_path / "nowhere" / "out.jsonl"), ["nowhere"]),
        ((source, source), ["is the input"]),
        (("/dev/null", new), ["/dev/null", "no pipe"]),
        ((source, "/dev/null"), ["/dev/null", "no pipe"]),
        ((source, twice), ["twice.jsonl, line 1", "no result"]),
        ((source, torn), ["torn.jsonl, line 1", "no result"]),
        ((source, other), ["other.jsonl, line 2", "another job", "'c'"]),
        ((source, double), ["double.jsonl, line 2", "second result", "'a'"]),
        ((source, damaged), ["damaged.jsonl, line 1", "damaged"]),
        ((source, strange), ["strange.jsonl, line 1", "[1]"]),
        ((source, new, "--max-num-seqs", "0"), ["max_num_seqs=0"]),
        ((source, new, "--replicas", "0"), ["--replicas", "at least 1"]),
        ((source, new, "--chat-template", tmp_path / "none.jinja"), ["none.jinja"]),
        ((source, new, "--chat-template", latin), ["--chat-template", "latin.jinja", "UTF-8"]),
        ((source, new, "--chat-template", unended), ["--chat-template", "unended.jinja", "Jinja"]),
    ]
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for paths, words in cases:
        err = refusal(capsys, main, *paths, "--model", "/nowhere")
        assert all(word in err for word in words), err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_what_the_machine_lacks_is_one_line(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [request("a", prompt="x")])
    strict = arguments(source, tmp_path / "out.jsonl", "--enable-pipeline", "--pipeline-strict")
    with pytest.raises(SystemExit):
        main(strict)
    assert "needs a CUDA GPU" in capsys.readouterr().err.splitlines()[-1]


def test_a_rank_that_dies_is_one_line(tmp_path, capsys, monkeypatch):
    def die(*_):
        raise RankDiedError("rank 1 of 2 was killed by SIGKILL")

    monkeypatch.setattr("nanovllm.batch.__main__.answers", die)
    source = write(tmp_path / "in.jsonl", [request("a", prompt="x")])
    with pytest.raises(SystemExit) as error:
        main(arguments(source, tmp_path / "out.jsonl"))
    assert error.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("rank 1 of 2 was killed by SIGKILL")


@pytest.mark.parametrize("after", [b"", b"\n", b" \r\n\n"])
def test_a_byte_order_mark_is_no_request(tmp_path, after):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + after)
    assert not list(lines.read_lines(source))
    with source.open("ab") as file:
        file.write(json.dumps(request("a", prompt="x")).encode())
    (line,) = lines.read_lines(source)
    assert (line.custom_id, line.problem) == ("a", "")


def test_the_command_says_how_many_results_are_errors(tmp_path, capsys):
    given = [request(str(i), prompt=TEXT, max_tokens=1, top_p=i) for i in range(3)]
    for _ in range(2):  # the second finds all done
        run(tmp_path, given)
        assert "3 results, 2 of them errors" in capsys.readouterr().err


def test_two_processes_do_not_write_to_one_file(tmp_path):
    first = Results(tmp_path / "out.jsonl", [])
    with pytest.raises(ValueError, match="another process"):
        Results(tmp_path / "out.jsonl", [])
    first.close()
    Results(tmp_path / "out.jsonl", []).close()


def test_the_command_shows_its_progress_and_ends_in_order(tmp_path):
    source = write(tmp_path / "in.jsonl", stories(count=30))
    done = scripts.run("-m", "nanovllm.batch", *arguments(source, tmp_path / "out.jsonl"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"Batch: 100%.* 30/30 .*tokens/s", done.stderr)
    assert len(read(tmp_path / "out.jsonl")) == 30


def test_the_commands_of_the_readme_are_understood():
    lines = re.findall(r"^ +python -m nanovllm.batch (.*)", README.read_text("utf-8"), re.MULTILINE)
    assert len(lines) == 2
    assert all(parse_arguments(shlex.split(line)).model.startswith("Qwen/") for line in lines)


def test_a_line_torn_anywhere_is_dropped_and_written_anew(tmp_path):
    path = write(tmp_path / "out.jsonl", result_lines("a", "ü", "c"))
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with closing(Results(path, {"a", "ü", "c"})) as results:
            kept = sum(end <= size for end in ends)
            assert results.done == set(["a", "ü", "c"][:kept])
            results.append(read(write(tmp_path / "all", result_lines("a", "ü", "c")))[kept:])
        assert [key(result) for result in read(path)] == ["a", "ü", "c"]


def test_a_job_killed_at_random_moments_answers_every_line_once(tmp_path):
    source, output = write(tmp_path / "in.jsonl", stories(600)), tmp_path / "out.jsonl"
    killed = batch_jobs.run_and_kill(source, output, 8, 0.1, "--max-num-seqs", 8)
    assert killed >= 5
    batch_jobs.check_stories(read(output), 600)
