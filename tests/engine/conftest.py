"""Engines that the tests of this folder share: a small random model, and the embedded one."""

from pathlib import Path

import pytest

from nanovllm import LLM
from tests import small_tokenizers
from tests.checkpoints import VOCAB, Shape
from tests.engine.cases import GREEDY, OPTIONS, PROMPTS, check_empty, tokens


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    Shape(seed=5).write(path)
    return path


@pytest.fixture(scope="module")
def shared(directory):
    with LLM(str(directory), **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(shared) -> list[list[int]]:
    """What the model says after PROMPTS under GREEDY."""
    return tokens(shared.generate(PROMPTS, GREEDY, use_tqdm=False))


@pytest.fixture
def llm(shared):
    """The shared engine; after the test nothing may be left in it, and it must still work."""
    yield shared
    assert shared.is_finished()
    check_empty(shared)


@pytest.fixture(scope="module")
def speaking(tmp_path_factory) -> Path:
    """The same model with a tokenizer, all tokens of which are bytes and parts of words."""
    path = tmp_path_factory.mktemp("speaking")
    Shape(seed=5).write(path)
    small_tokenizers.write(small_tokenizers.byte_level(small_tokenizers.fill(VOCAB)), path)
    return path


@pytest.fixture(scope="module")
def speaker(speaking):
    with LLM(speaking, **OPTIONS) as engine:
        yield engine


@pytest.fixture
def spoken(speaker):
    """The shared engine of that model; after the test nothing may be left in it."""
    yield speaker
    assert speaker.is_finished()
    check_empty(speaker)


@pytest.fixture(scope="module")
def tiny():
    """The embedded model, which has a tokenizer."""
    with LLM(device="cpu") as engine:
        yield engine
