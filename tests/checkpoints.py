"""Small random checkpoints of every architecture, written by transformers, the oracle."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nanovllm.kernels.reference_sampling import SAMPLE_TILE
from nanovllm.models.architectures import ARCHITECTURES
from nanovllm.models.rope import COMMON_FIELDS, ROPES

VOCAB = 512
# Not whole tiles of a draw; the last of several ranks holds less of it than the others, or nothing.
ODD_VOCAB = 3 * SAMPLE_TILE + 509
TABLE = {entry.model_type: entry for entry in ARCHITECTURES}
# All fields of config.json that mean something to any architecture, those of rope included.
FIELD_NAMES = list(
    dict.fromkeys(
        name
        for fields in [
            *[entry.fields for entry in ARCHITECTURES],
            *[COMMON_FIELDS, *ROPES.values()],
        ]
        for name in fields
    )
)


@dataclass
class Shape:
    """What varies between test models; a checkpoint of it is `write(directory)`."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int | None = 64  # None: absent, hidden / heads
    hidden: int = 48
    intermediate: int = 96
    tied: bool = False
    bias: bool = False
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})
    seed: int = 0
    model_type: str = "qwen3"
    more: dict[str, Any] = field(default_factory=dict)  # further fields of config.json

    @classmethod
    def random(cls, seed: int, model_type: str = "qwen3") -> Shape:
        """A configuration drawn from everything that the engine supports."""
        rng, entry = random.Random(seed), TABLE[model_type]
        ratio, kv_heads = rng.choice([(1, 2), (2, 2), (4, 1), (5, 1), (8, 1), (2, 1)])
        heads = ratio * kv_heads
        shape = cls(
            layers=rng.randint(1, 3),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=rng.choice([64, 128]),
            hidden=rng.choice([32, 48, 80]),
            intermediate=rng.choice([64, 112]),
            tied=rng.random() < 0.5,
            bias=entry.o_bias is None and rng.random() < 0.5,
            rope=random_rope(rng, rng.choice(["default", *entry.ropes])),
            seed=seed,
            model_type=model_type,
        )
        if entry.fields["head_dim"][1] is None and rng.random() < 0.5:
            return replace(shape, head_dim=None, hidden=heads * rng.choice([16, 32]))
        return shape.with_allowed_hidden()

    def with_allowed_hidden(self) -> Shape:
        """For Llama, whose hidden size transformers wants to be a multiple of the heads."""
        if self.model_type != "llama":
            return self
        return replace(self, hidden=-(-self.hidden // self.heads) * self.heads)

    def config(self) -> PretrainedConfig:
        fields: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": 256,
            "tie_word_embeddings": self.tied,
            "rope_parameters": {**self.rope, "rope_theta": 10000.0},
            "eos_token_id": 1,
            "bos_token_id": None,
            "pad_token_id": 0,
        }
        if self.head_dim:
            fields["head_dim"] = self.head_dim
        if self.bias:
            fields["attention_bias"] = True
        return AutoConfig.for_model(self.model_type, **fields, **self.more)

    def build(self) -> PreTrainedModel:
        """A float32 model with weights large enough for its tokens to vary."""
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_config(self.config()).eval()
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.15)
        return model

    def write(self, directory: Path) -> PreTrainedModel:
        """Saves the model in `directory` and returns it."""
        model = self.build()
        model.save_pretrained(directory)
        return model


class OddVocabShape(Shape):
    """A `Shape` whose vocabulary several ranks have a part of."""

    def config(self) -> PretrainedConfig:
        config = super().config()
        config.vocab_size = ODD_VOCAB
        return config


def edit_json(path: Path, **changes: Any) -> None:
    """Sets fields of an object; `...` drops one."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: v for name, v in fields.items() if v is not ...}))


def random_rope(rng: random.Random, rope_type: str) -> dict[str, Any]:
    """A rope of that type that shows within a hundred tokens."""
    rope: dict[str, Any] = {"rope_type": rope_type}
    if rope_type != "default":
        rope["factor"] = rng.choice([2.0, 4.0])
        rope["original_max_position_embeddings"] = rng.choice([32, 64])
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": rng.choice([2.0, 4.0])}
    return rope


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
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
