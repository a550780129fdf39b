"""Manners of the scripts: an error is one line and exit code 2, an interrupt has no traceback."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import example_pipeline
from nanovllm.utils.command_line import INTERRUPTED, Parser, in_one_line
from tests import scripts
from tests.bench_runs import refusal, without_text

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
        (["--timeline", "steps.txt"], ["--timeline", ".png", ".json"]),
        (["--prompt", "One", "--prompt", ""], ["--prompt", "empty"]),
        (["--prompt", os.fsdecode(b"One\xff")], ["--prompt", "One\\udcff", "UTF-8"]),
        (["--max-tok", "9"], ["--max-tok"]),
        (["--max-tokens", "1", "--timeline", "steps.json"], ["--timeline", "--max-tokens"]),
    ],
)
def test_a_bad_value_of_the_example_is_one_line(argv, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example_pipeline.py", *argv])
    monkeypatch.setattr("nanovllm.engine.model_runner.ModelRunner", None)
    monkeypatch.setattr("nanovllm.engine.llm_engine.load_tokenizer", None)
    err = refusal(capsys, lambda _: example_pipeline.main())
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "module", ["example_pipeline", "nanovllm.bench.__main__", "nanovllm.batch.__main__"]
)
def test_numpy_is_there_before_torch_which_would_swallow_an_interrupt(module):
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os._exit(0 if hasattr(sys.modules.get("numpy"), "isfinite") else 3)
sys.meta_path.insert(0, Watch())
import {module}
"""
    assert scripts.run("-c", code).returncode == 0


def test_an_interrupt_has_a_code_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as error, in_one_line("script.py"):
        raise KeyboardInterrupt
    assert error.value.code == INTERRUPTED
    assert "script.py" in capsys.readouterr().err


def test_only_the_errors_of_a_request_are_shortened():
    with pytest.raises(ZeroDivisionError), in_one_line("script.py", ValueError):
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as error, in_one_line("script.py", ValueError):
        raise ValueError("two\nlines")
    assert error.value.code == 2


def test_a_parser_shows_its_text_as_it_is(capsys):
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
def test_help_works_from_a_shell(command, text):
    run = subprocess.run(
        [sys.executable, *command.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert text in run.stdout
    assert not without_text(run.stdout)


LIBRARY_IS_LOADED = "libtorch_python"
SCRIPTS = {
    "example": [ROOT / "example_pipeline.py", "--max-tokens", 1000],
    "bench": [ROOT / "bench_pipeline.py", "--device", "cpu", "--seconds", 60],
    "batch": ["-m", "nanovllm.batch", "in.jsonl", "out.jsonl", "--model", "nowhere"],
}


@pytest.fixture
def _signals_arrive() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and so does what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_signals_arrive")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc on this system")
@pytest.mark.parametrize(
    ("script", "moment"),
    [*((script, "import") for script in SCRIPTS), ("example", "run"), ("bench", "run")],
)
def test_an_interrupt_ends_a_script_without_a_traceback(script, moment):
    process = scripts.start(*SCRIPTS[script])
    assert process.stderr is not None
    err = ""
    if moment == "import":
        while LIBRARY_IS_LOADED not in Path(f"/proc/{process.pid}/maps").read_text():
            assert process.poll() is None
    else:
        while not re.search(r"Generating.*\]|Measuring.*\| [1-9]\d+/", err):
            err += process.stderr.read(1)
        time.sleep(0.1)  # tqdm has still to finish a bar that is shown for the first time
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=200)
    assert process.returncode == INTERRUPTED
    assert "Traceback" not in err + rest
    assert ((script, moment) == ("bench", "run")) == ('"benchmark"' in out)
