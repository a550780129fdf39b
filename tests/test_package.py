"""What users see of the package before they run it: options in editors, help and type checkers."""

import dataclasses
import inspect
import pydoc
import re
import sys
from importlib import metadata, resources
from pathlib import Path
from subprocess import run
from typing import get_type_hints

import pytest

import nanovllm
from nanovllm import LLM, Config, LLMEngine, SamplingParams
from nanovllm.config import ConfigOptions
from nanovllm.sampling_params import SamplingOptions

ROOT = Path(nanovllm.__file__).parents[1]
PROGRAM = Path(__file__).with_name("user_program.py")
# As users have it: what is installed is read for its types, but not judged.
MYPY = """
[mypy]
python_version = 3.10
ignore_missing_imports = true
[mypy-nanovllm.*]
follow_imports = silent
[mypy-torch.*,transformers.*,triton.*,numpy.*,huggingface_hub.*]
follow_imports = skip
"""


def test_the_types_of_keyword_options_are_those_of_the_fields():
    assert {"model": str, **get_type_hints(ConfigOptions)} == get_type_hints(Config)
    assert get_type_hints(SamplingOptions) == get_type_hints(SamplingParams)


@pytest.mark.parametrize(
    ("function", "cls"),
    [
        (LLM, Config),
        (LLMEngine, Config),
        (LLM.generate, SamplingParams),
        (LLM.stream, SamplingParams),
        (LLM.add_request, SamplingParams),
    ],
    ids=lambda value: value.__qualname__,
)
def test_editors_see_all_options_of_the_engine(function, cls):
    fields = {field.name: field.default for field in dataclasses.fields(cls)}
    if cls is Config:
        fields["model"] = None  # the default of `Config`
    parameters = inspect.signature(function).parameters
    assert {name: parameters[name].default for name in fields} == fields
    assert not any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def test_help_tells_all_options():
    text = pydoc.plain(pydoc.render_doc(LLM))
    for cls in (Config, SamplingParams):
        meanings = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
        names = re.findall(r"^ {4}(\w+): ", meanings, re.MULTILINE)
        assert names == [field.name for field in dataclasses.fields(cls)]
        assert all(line.strip() in text for line in meanings.splitlines())


def test_a_type_checker_finds_the_mistakes_of_users_and_nothing_else(tmp_path):
    config = tmp_path / "mypy.ini"
    config.write_text(MYPY)
    options = ["--config-file", config, "--cache-dir", tmp_path, "--hide-error-context"]
    command = [sys.executable, "-m", "mypy", *options, "--no-pretty", PROGRAM]
    out = run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    found = re.findall(r"^.*?:(\d+): error: .*\[([\w-]+)\]$", out, re.MULTILINE)
    lines = enumerate(PROGRAM.read_text("utf-8").splitlines(), 1)
    planted = [
        (str(number), code)
        for number, line in lines
        for code in re.findall(r"# error: ([a-z-]+)$", line)
    ]
    assert len(planted) > 15
    assert found == planted, out


def test_the_package_says_its_version_and_that_it_is_typed():
    assert nanovllm.__version__ == metadata.version("nano-vllm-pipeline")
    assert resources.files("nanovllm").joinpath("py.typed").is_file()


def test_importing_the_package_waits_for_nothing():
    """Torch comes with the first name that is asked for."""
    code = "import sys, nanovllm; assert 'torch' not in sys.modules; nanovllm.LLM; nanovllm.nothing"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "module 'nanovllm' has no attribute 'nothing'" in done.stderr
