"""README and docs/: each command is one that its script takes, and each file named is there."""

import random
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import example_pipeline
from nanovllm.bench import __main__ as bench
from nanovllm.bench import options
from nanovllm.config import Config
from nanovllm.tiny import CHECKPOINT_DIR

ROOT = Path(example_pipeline.__file__).parent
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
# In text or a block, up to a comment or the end of the code span or line.
COMMAND = re.compile(r"python (\S+\.py|-m nanovllm\.bench)([^`#\n]*)")
# In a script's docstring, up to what is said about it.
DESCRIBED = re.compile(r"^python (\S+\.py|-m nanovllm\.bench)(.*?)(?:  .*)?$", re.MULTILINE)


def commands() -> list[tuple[str, str]]:
    """Scripts, and what follows their names, each once."""
    found = [each for path in DOCUMENTS for each in COMMAND.findall(path.read_text("utf-8"))]
    for script in (bench, example_pipeline):
        found += DESCRIBED.findall(script.__doc__ or "")
    return list(dict.fromkeys((script, line.strip()) for script, line in found))


@cache
def help_words(script: str) -> list[str]:
    """The words of what a script says of its options."""
    command = [sys.executable, script, "--help"]
    return re.findall(r"[\w-]+", subprocess.check_output(command, cwd=ROOT, text=True))


def python_blocks() -> list[str]:
    """The programs in README; not the loop, which is a method."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTS[0].read_text("utf-8"), re.DOTALL)
    return [block for block in blocks if "import" in block]


def test_all_commands_are_found():
    scripts = [script for script, _ in commands()]
    assert scripts.count("bench_pipeline.py") > 20
    assert scripts.count("-m nanovllm.bench") > 9
    assert scripts.count("example_pipeline.py") > 4
    assert scripts.count("green_ctx.py") == 1


@pytest.mark.parametrize(("script", "line"), commands(), ids=" ".join)
def test_a_command_is_understood(script, line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(options, "resolve_device", lambda name: torch.device("cuda", 0))
    argv = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [script, *argv])
    is_bench = script in ("bench_pipeline.py", "-m nanovllm.bench")
    if is_bench and "--help" in argv:
        with pytest.raises(SystemExit, match=r"^0$"):
            options.parse(None, argv)
    elif is_bench:
        args = options.parse(None, argv)
        assert args.workload in bench.WORKLOADS
        stored = getattr(args, "stored", None) or []
        assert all(path.exists() for path in stored if path.parent.name == "docs")
    elif script == "example_pipeline.py":
        assert example_pipeline.parse_arguments().mode in ("auto", "green")
    else:
        options_of = [word for word in argv if word.startswith("--")]
        assert not options_of or {*options_of} <= {*help_words(script)}


@pytest.mark.parametrize("block", python_blocks(), ids=["LLM", "chat", "Config"])
def test_python_of_the_readme_runs(block, capsys):
    """With the tiny model, which has no chat template, and less to do."""
    program = re.sub(r'"Qwen/[^"]*"', repr(str(CHECKPOINT_DIR)), block)
    program = re.sub(r"\b(1024|512|50)\b", "4", program)
    template = "chat_template=\"{{ messages[0]['content'] }}\", "
    program = program.replace("}], ", "}], " + template)
    names: dict[str, object] = {}
    random.seed(0)  # requests without a seed draw theirs here
    exec(program, names)
    if "engine" in names:
        names["engine"].exit()  # type: ignore[attr-defined]
    shown = capsys.readouterr().out
    assert shown.strip()
    assert ("[Pipeline Statistics]" in shown) == ("print_pipeline_statistics" in block)


def test_files_of_the_code_map_are_there():
    readme = DOCUMENTS[0].read_text("utf-8").partition("## Read it")[2]
    lines = re.search(r"```text\n(.*?)```", readme, re.DOTALL)
    assert lines is not None
    paths = re.findall(r"^(\S+)", lines[1], re.MULTILINE)
    assert len(paths) > 20
    missing = [path for path in paths if not (ROOT / "nanovllm" / path).exists()]
    assert not missing
    names = set(re.findall(r"\w+\.py", lines[1]))
    assert names <= {path.name for path in (ROOT / "nanovllm").rglob("*.py")} | {
        "bench_pipeline.py"
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_names_is_there(document):
    text = document.read_text("utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert all((document.parent / link).exists() for link in links)
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", text):
        assert (ROOT / path).exists() or (ROOT / "nanovllm" / path).exists(), path
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", text))


def test_the_options_of_the_readme_are_those_of_config():
    table = re.findall(r"^\| `(\w+)` \| \w+ \| (\S+) \|", DOCUMENTS[0].read_text("utf-8"), re.M)
    defaults = vars(Config())
    named = {name: default.strip('`"') for name, default in table}
    assert named == {name: str(defaults[name]) for name in defaults if "pipeline" in name}
