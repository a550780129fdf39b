"""Manners of the scripts: an error is one line and exit code 2, an interrupt has no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import example_pipeline
from nanovllm.utils.command_line import INTERRUPTED, Parser, in_one_line
from tests.bench_runs import refusal

ROOT = Path(example_pipeline.__file__).parent


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-tokens", "many"], ["--max-tokens", "many"]),
        (["--max-tokens", "0"], ["max_tokens=0"]),
        (["--temperature", "-1"], ["temperature=-1.0"]),
        (["--mode", "fast"], ["--mode", "fast", "green"]),
        (["--device", "tpu"], ["device='tpu'", "cuda"]),
        (["--attention-sms", "0"], ["pipeline_attention_sm_count=0"]),
        (["--model", "/nowhere/at/all"], ["/nowhere/at/all"]),
        (["--timeline", "nowhere/steps.json"], ["--timeline", "nowhere"]),
        (["--max-tok", "9"], ["--max-tok"]),
    ],
)
def test_a_bad_value_of_the_example_is_one_line(
    argv: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["example_pipeline.py", *argv])
    err = refusal(capsys, lambda _: example_pipeline.main())
    assert all(word in err for word in words), err


def test_an_interrupt_has_a_code_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error, in_one_line("script.py"):
        raise KeyboardInterrupt
    assert error.value.code == INTERRUPTED
    assert "script.py" in capsys.readouterr().err


def test_only_the_errors_of_a_request_are_shortened() -> None:
    with pytest.raises(ZeroDivisionError), in_one_line("script.py", ValueError):
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as error, in_one_line("script.py", ValueError):
        raise ValueError("two\nlines")
    assert error.value.code == 2


def test_a_parser_shows_its_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        Parser("one\n   two").parse_args(["--help"])
    assert error.value.code == 0
    assert "one\n   two" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("example_pipeline.py", "python example_pipeline.py"),
        ("bench_pipeline.py", "python -m nanovllm.bench"),
        ("-m nanovllm.bench", "python -m nanovllm.bench"),
    ],
)
def test_help_works_from_a_shell(command: str, text: str) -> None:
    run = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert text in run.stdout
