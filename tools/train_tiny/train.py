"""Train the embedded model: from nothing but `stories.py` to a checkpoint directory.

    python -m tools.train_tiny.train [--out DIR] [--steps N] [--seed S]

Trains a tokenizer and then a small Qwen3 on stories made up as they are needed, so there is no
data set, and prints a report (`report.py`). It needs torch, transformers and tqdm, runs on a CPU,
and takes about ten minutes. The directory loads with `from_pretrained`, like any Qwen3.

Reproducible: the same seed and step count, on the same kind of CPU with the same releases of
torch, transformers and tokenizers, give the same bytes. The thread count matters too (it decides
the order of additions), so it is part of the recipe and set here. Another CPU or another torch
gives a model just as good, but not the same bytes.
"""

import argparse
import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tqdm import trange
from transformers import Qwen3Config, Qwen3ForCausalLM

from nanovllm.tiny import CHECKPOINT_DIR
from tools.train_tiny.report import report
from tools.train_tiny.stories import story
from tools.train_tiny.tokenizer import EOS_TOKEN, save_tokenizer, train_tokenizer

IGNORE = -100  # the label that transformers leaves out of the loss


# config.json, with the keys that published Qwen3 models have.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 4096,
    "max_window_layers": 4,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": transformers.__version__,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 1024,
}


@dataclass(frozen=True)
class Recipe:
    """How to train. A step sees `rows` x `length` tokens; `threads` is part of the result."""

    steps: int = 1200
    seed: int = 0
    rows: int = 8
    length: int = 256
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    tokenizer_stories: int = 5000
    threads: int = 1


@contextmanager
def reproducible(seed: int, threads: int) -> Iterator[None]:
    """Seed torch, fix its thread count and its algorithms; put all of it back afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            torch.use_deterministic_algorithms(before[1])


def batch(
    rng: random.Random, tokenizer: Tokenizer, rows: int, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack new stories into token ids and positions, both int64 [rows, length].

    A row holds whole stories, each ending with EOS and each with positions from 0, until the last
    one is cut off by the end of the row.
    """
    ids, positions = [], []
    for _ in range(rows):
        row: list[int] = []
        where: list[int] = []
        while len(row) < length:
            document = tokenizer.encode(story(rng) + EOS_TOKEN).ids
            row += document
            where += range(len(document))
        ids.append(row[:length])
        positions.append(where[:length])
    return torch.tensor(ids), torch.tensor(positions)


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear warmup over that share of the steps, then half a cosine down to zero."""
    warm = max(1, int(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def fit(model: Qwen3ForCausalLM, tokenizer: Tokenizer, recipe: Recipe) -> float:
    """Train in place; returns the mean loss of the last twentieth of the steps, nats a token.

    Every batch is made up anew, so the training loss is an honest one.
    """
    rng = random.Random(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, recipe.steps, recipe.warmup)
    )
    losses: list[float] = []
    model.train()
    progress = trange(recipe.steps, desc="training")
    for _ in progress:
        ids, positions = batch(rng, tokenizer, recipe.rows, recipe.length)
        # The end of one story says nothing about the next, so nobody is asked to guess its first
        # token. Positions that begin again tell (recent) transformers where attention must stop.
        labels = ids.masked_fill(positions == 0, IGNORE)
        loss = model(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    last = losses[-max(1, recipe.steps // 20) :]
    return sum(last) / len(last)


def train(directory: Path, config: dict[str, Any], recipe: Recipe) -> float:
    """Make a whole checkpoint in `directory` (created if need be); returns the final loss."""
    rng = random.Random(recipe.seed)
    texts = (story(rng) for _ in range(recipe.tokenizer_stories))
    tokenizer = train_tokenizer(texts, config["vocab_size"])
    with reproducible(recipe.seed, recipe.threads):
        model = Qwen3ForCausalLM(Qwen3Config(**config)).float()
        loss = fit(model, tokenizer, recipe)
    weights = {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
        if name != "lm_head.weight"  # tied: it is the embedding
    }
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    directory.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, directory)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
    return loss


CARD = """# The embedded model

A very small Qwen3 (1,968,320 parameters) that tells short stories, so that the engine has
something to run without a download. It is not good for anything else: it knows only the grammar
in `tools/train_tiny/stories.py`, and was trained from scratch on nothing but stories made by it.

| | |
|---|---|
| Made by | `python -m tools.train_tiny.train --steps {steps} --seed {seed}` |
| Size | {size:,} bytes of weights in bfloat16 |
| Final loss | {loss:.4f} nats a token (the grammar is random, so it cannot reach zero) |
| Greedy margin | {margin:.2f} logits at the closest choice in the 16 standard prompts |
| Licence | MIT, as the project |

It has no chat template: give it the beginning of a story, such as "Once upon a time".
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT_DIR, help="where to write it")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps, seed=arguments.seed)
    torch.set_num_threads(recipe.threads)  # for the report as well: a small model waits for threads
    loss = train(arguments.out, CONFIG, recipe)
    margin = report(arguments.out)
    size = (arguments.out / "model.safetensors").stat().st_size
    card = CARD.format(steps=recipe.steps, seed=recipe.seed, size=size, loss=loss, margin=margin)
    (arguments.out / "README.md").write_text(card)
    print(f"smallest margin {margin:.3f}; final loss {loss:.4f} nats a token")


if __name__ == "__main__":
    main()
