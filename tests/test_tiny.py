"""The embedded model: its grammar, its training script and the checkpoint that ships."""

import random
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3ForCausalLM

from nanovllm.tiny import CHECKPOINT_DIR, PROMPTS
from tools.train_tiny import stories
from tools.train_tiny.report import complete
from tools.train_tiny.train import CONFIG, Recipe, train

SENTENCE_END = re.compile(r'[.!?]"?(?= ["A-Z]|$)')
TINY_CONFIG = CONFIG | {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "max_window_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
TINY_RECIPE = Recipe(steps=2, rows=2, length=64, tokenizer_stories=20, threads=2)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    return Qwen3ForCausalLM.from_pretrained(CHECKPOINT_DIR).float().eval()


def check_whole_sentences(text: str) -> None:
    assert re.match(r'["A-Z]', text)
    assert re.search(r'[.!?]"?$', text)


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def test_stories_are_well_formed():
    rng = random.Random(0)
    for _ in range(2000):
        text = stories.story(rng)
        check_whole_sentences(text)
        assert 3 <= len(SENTENCE_END.findall(text)) <= 8, text
        assert not re.search(r"[][{}|]|  |\b[Aa] [aeiou]", text), text
        assert text.count('"') % 2 == 0, text


def test_grammar_names_things_that_exist():
    names = {hero.name for hero in stories.HEROES}
    for _, heroes, plots in stories.OPENINGS:
        assert names.issuperset(heroes)
        assert stories.PLOTS.keys() >= set(plots)
    for hero in stories.HEROES:
        assert stories.PLOTS.keys() >= set(hero.plots)
        assert hero.name not in hero.friends


def test_choices_are_skewed():
    rng = random.Random(0)
    picks = [stories.choose(rng, "abc", manner=1) for _ in range(5000)]
    assert picks.count("b") > 2 * picks.count("c") > 2 * picks.count("a") > 0


def test_importing_the_package_is_cheap():
    """Loaded by path, as `nanovllm` itself may import what it likes."""
    code = f"import runpy, sys; runpy.run_path({str(CHECKPOINT_DIR.parent / '__init__.py')!r})"
    check = "; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code + check], check=True)


def test_checkpoint_is_small():
    files = [path for path in CHECKPOINT_DIR.rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 8 * 1024 * 1024


@pytest.mark.parametrize("text", [*PROMPTS[:2], 'Café: "x = 3.14"\n\n\t日本語 🙂', ""])
def test_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_knows_its_special_tokens(tokenizer):
    assert tokenizer.encode("<|endoftext|><|im_end|>") == [0, 1]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


@pytest.mark.parametrize("prompt", PROMPTS[::3])
def test_greedy_completions_are_stories(model, tokenizer, prompt):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=200)[0]
    assert output[-1] == tokenizer.eos_token_id
    text = str(tokenizer.decode(output, skip_special_tokens=True))
    check_whole_sentences(text)
    rng = random.Random(0)
    assert words(text) <= words(" ".join(stories.story(rng) for _ in range(3000)))


def test_margin_is_wide_enough_for_bfloat16(model, tokenizer):
    assert complete(model, tokenizer, PROMPTS[0]).margin > 0.3


def test_training_is_reproducible(tmp_path):
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    losses = [train(tmp_path / name, TINY_CONFIG, TINY_RECIPE) for name in "ab"]
    assert losses[0] == losses[1]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads


def test_training_depends_on_the_seed(tmp_path):
    recipe = replace(TINY_RECIPE, seed=1)
    train(tmp_path / "a", TINY_CONFIG, TINY_RECIPE)
    train(tmp_path / "b", TINY_CONFIG, recipe)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] != weights[1]
