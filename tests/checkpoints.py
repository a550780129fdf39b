"""Small random Qwen3 checkpoints, written by transformers, the oracle."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB = 512


@dataclass
class Shape:
    """What varies between test models; a checkpoint of it is `write(directory)`."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 48
    intermediate: int = 96
    tied: bool = False
    bias: bool = False
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    seed: int = 0

    @classmethod
    def random(cls, seed: int) -> Shape:
        """A configuration drawn from everything that the engine supports."""
        rng = random.Random(seed)
        ratio, kv_heads = rng.choice([(1, 2), (2, 2), (4, 1), (5, 1), (8, 1), (2, 1)])
        yarn = {
            "rope_type": "yarn",
            "factor": rng.choice([2.0, 4.0]),
            "original_max_position_embeddings": rng.choice([32, 64]),
        }
        return cls(
            layers=rng.randint(1, 3),
            heads=ratio * kv_heads,
            kv_heads=kv_heads,
            head_dim=rng.choice([64, 128]),
            hidden=rng.choice([32, 48, 80]),
            intermediate=rng.choice([64, 112]),
            tied=rng.random() < 0.5,
            bias=rng.random() < 0.5,
            rope=yarn if rng.random() < 0.4 else {"rope_type": "default"},
            seed=seed,
        )

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=256,
            tie_word_embeddings=self.tied,
            attention_bias=self.bias,
            rope_parameters={**self.rope, "rope_theta": 10000.0},
            eos_token_id=1,
            bos_token_id=None,
            pad_token_id=0,
        )

    def build(self) -> Qwen3ForCausalLM:
        """A float32 model with weights large enough for its tokens to vary."""
        torch.manual_seed(self.seed)
        model = Qwen3ForCausalLM(self.config()).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15)
        return model

    def write(self, directory: Path) -> Qwen3ForCausalLM:
        """Saves the model in `directory` and returns it."""
        model = self.build()
        model.save_pretrained(directory)
        return model


@torch.inference_mode()
def greedy(model: Qwen3ForCausalLM, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers generates after `prompt`, up to and with the end-of-sequence token."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=max_tokens,
        do_sample=False,
    )
    return out[0, len(prompt) :].tolist()


def prompts(seed: int, count: int, longest: int = 60) -> list[list[int]]:
    """Random prompts of mixed lengths; about half begin with the same tokens."""
    rng = random.Random(seed)
    shared = [rng.randrange(2, VOCAB) for _ in range(longest)]
    result = []
    for _ in range(count):
        length = rng.randint(1, longest)
        kept = rng.randint(0, length) if rng.random() < 0.5 else 0
        result.append(
            shared[:kept] + [rng.randrange(2, VOCAB) for _ in range(max(length - kept, 1))]
        )
    return result
