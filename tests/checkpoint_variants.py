"""Sound checkpoints in all the spellings that transformers loads, drawn from a seed.

    name = write_variant(directory, seed)

Each is a very small model of one of the architectures, with its config, its weights and the files
beside them as checkpoints on the hub have them. `engine_tokens` and `oracle_tokens` say what comes
after PROMPT, which is long enough for every variant of rope to show.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from nanovllm import LLM
from nanovllm.engine.outputs import Completion
from nanovllm.models.architectures import Architecture
from tests.checkpoint_mutations import add_tokenizer
from tests.checkpoints import TABLE, VOCAB, Shape

PROMPT = [(i * 7) % 500 + 2 for i in range(150)]
NUM_TOKENS = 6
# Names of it that transformers knows; older releases only the first.
KNOWS_BOTH = Version(transformers.__version__) >= Version("5.18")
FULL_ATTENTION = ["full_attention", "attention"][: 1 + KNOWS_BOTH]
ENGINE = {"device": "cpu", "max_model_len": 256, "kvcache_block_size": 16, "num_kvcache_blocks": 20}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# In the place of a token whose logits are no numbers, after which there are no others.
NO_NUMBERS = -1

Fields = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def engine_tokens(directory: Path, **options: Any) -> list[int]:
    """What the engine says after the prompt, cut to its longest sequence."""
    with LLM(str(directory), **ENGINE, **options) as llm:
        return complete(llm)["token_ids"]


def complete(llm: LLM) -> Completion:
    """What the engine says after the prompt, cut to its longest sequence."""
    prompt, count = fitted_prompt(llm.model_runner.max_model_len)
    (output,) = llm.generate(
        [prompt], temperature=0, max_tokens=count, ignore_eos=True, use_tqdm=False
    )
    return output


def fitted_prompt(longest: int) -> tuple[list[int], int]:
    """The prompt and the number of tokens after it, where no more than `longest` fit."""
    count = max(1, min(NUM_TOKENS, longest - 1))
    return PROMPT[: max(1, longest - count)], count


@torch.inference_mode()
def oracle_tokens(directory: Path, longest: int = ENGINE["max_model_len"]) -> list[int]:
    """What transformers says there, without the help of its generation, whose config may be odd."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    prompt, count = fitted_prompt(longest)
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        if logits.isnan().any():
            return [*ids[len(prompt) :], NO_NUMBERS]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def write_variant(directory: Path, seed: int) -> str:
    """Writes the variant of that seed into an empty directory; returns what was varied."""
    rng = random.Random(seed)
    shape, shape_name = draw_shape(rng)
    entry = TABLE[shape.model_type]
    rope, rope_name = draw_rope(rng, entry.ropes)
    model = shape.build()
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    fields = model.config.to_dict() | {"architectures": [entry.name]}
    for name in ("rope_parameters", "_name_or_path", "dtype", "layer_types"):
        fields.pop(name, None)
    fields |= rope
    names = [shape_name, rope_name, spell_fields(rng, fields, shape, entry)]
    names.append(spell_tensors(rng, tensors, shape))
    names.append(write_weights(rng, directory, tensors))
    (directory / "config.json").write_text(json.dumps(fields))
    names.append(write_files_beside(rng, directory))
    return " / ".join(names)


def draw_shape(rng: random.Random) -> tuple[Shape, str]:
    heads, kv_heads, head_dim = rng.choice(
        [(2, 1, 128), (2, 2, 64), (4, 2, 32), (4, 4, 16), (3, 1, 80), (1, 1, 256), (32, 32, 8)]
    )
    entry = rng.choice(list(TABLE.values()))
    shape = Shape(
        layers=rng.choice([1, 2, 3]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=rng.choice([32, 48]),
        intermediate=64,
        tied=rng.random() < 0.5,
        bias=entry.o_bias is None and rng.random() < 0.3,
        seed=rng.randrange(1000),
        model_type=entry.model_type,
    )
    if entry.fields["head_dim"][1] is None and heads * head_dim < 300 and rng.random() < 0.5:
        shape = replace(shape, head_dim=None, hidden=heads * head_dim)
    shape = shape.with_allowed_hidden()
    sizes = f"{heads}x{kv_heads}x{shape.head_dim}"
    return shape, f"{entry.model_type} {sizes} tied={shape.tied} bias={shape.bias}"


def draw_rope(rng: random.Random, types: tuple[str, ...]) -> tuple[Fields, str]:
    """Fields of config.json that say what rope to use, in one of the spellings."""
    theta = rng.choice([None, 10_000.0, 500_000, 1e6])
    kind = rng.choice(types[1:])
    scaling = SCALINGS[kind](rng) if rng.random() < 0.6 else {}
    fields: Fields = {}
    if scaling and rng.random() < 0.25:
        original = scaling.pop("original_max_position_embeddings", None)
        fields["original_max_position_embeddings"] = original or 64
    style = rng.choice(["old", "new", "both", "mixed"])
    if style == "old":
        fields["rope_scaling"] = scaling or rng.choice([None, {}, {"type": "default"}])
        fields["rope_theta"] = theta or 10_000
    elif style == "new":
        fields["rope_parameters"] = scaling | {"rope_theta": theta or 10_000.0}
        if not scaling and rng.random() < 0.5:
            fields["rope_parameters"]["rope_type"] = "default"
    elif style == "both":  # the scaling wins, and what it lacks is not taken from the other
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 77_777.0}
        fields["rope_scaling"] = scaling or None
    else:
        fields["rope_parameters"] = scaling
    if theta and style in ("both", "mixed"):
        fields["rope_theta"] = theta
    if rng.random() < 0.2:
        fields["partial_rotary_factor"] = rng.choice([1, 1.0, None])
    return fields, f"rope {json.dumps(fields)}"


def draw_yarn(rng: random.Random) -> Fields:
    yarn: Fields = {rng.choice(["rope_type", "type"]): "yarn"}
    yarn["factor"] = rng.choice([4.0, 2, 8.0, 1.5, 1.0, None])
    optional: dict[str, list[Any]] = {
        "original_max_position_embeddings": [64, 32, 100, 64.0],
        "attention_factor": [0.7, 1, None],
        "beta_fast": [16, 4.5, None, 0],
        "beta_slow": [2.0, None],
        "mscale": [0.7, 1.0, 0, None],
        "mscale_all_dim": [1.1, 0.5],
        "truncate": [False, True],
        "finetuned": [True],
        "partial_rotary_factor": [1.0],
    }
    for name, values in optional.items():
        if rng.random() < (0.8 if name.startswith("original") else 0.25):
            yarn[name] = rng.choice(values)
    return yarn


def draw_llama3(rng: random.Random) -> Fields:
    llama3: Fields = {
        rng.choice(["rope_type", "type"]): "llama3",
        "factor": rng.choice([8.0, 32, 2, 1.0, 0.5]),
        "low_freq_factor": rng.choice([1.0, 1, 0.5]),
        "high_freq_factor": rng.choice([4.0, 4, 2, 1.5]),
    }
    if rng.random() < 0.8:
        llama3["original_max_position_embeddings"] = rng.choice([64, 32, 100])
    if rng.random() < 0.25:
        llama3["attention_factor"] = 0.5  # means nothing here
    return llama3


# By rope_type: what scales the default rope.
SCALINGS = {"yarn": draw_yarn, "llama3": draw_llama3}


def spell_fields(rng: random.Random, fields: Fields, shape: Shape, entry: Architecture) -> str:
    """Leaves out what has the default of transformers' class, and spells the rest another way."""
    fields["max_position_embeddings"] = rng.choice([256, 300, 40_960])
    defaults = {name: default for name, (_, default) in entry.fields.items()}
    # Absent, it is as wide as the heads together.
    defaults["head_dim"] = defaults["head_dim"] or shape.hidden // shape.heads
    defaults["num_key_value_heads"] = defaults["num_key_value_heads"] or shape.heads
    done = []
    for name, value in defaults.items():
        if name in fields and fields[name] == value and rng.random() < 0.4:
            del fields[name]
            done.append(f"no {name}")
    options: dict[str, list[Any]] = {
        "hidden_act": ["swish", "silu"],
        "architectures": [None, [], [entry.base_name], [entry.name, "Other"]],
        "torch_dtype": ["bfloat16", "float", "half", None],
        "dtype": ["float16", None],
        "layer_types": [None, *([name] * shape.layers for name in FULL_ATTENTION)],
        "rms_norm_eps": [1e-6, 1e-5],
        "auto_map": [{"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"}],
        "unknown_field": [{"a": [1, {}]}],
        "eos_token_id": [1, [1, 2], None, -1],
    }
    if shape.model_type == "llama":
        options |= {"pretraining_tp": [1, None], "mlp_bias": [False]}
    if shape.heads == shape.kv_heads:
        options["num_key_value_heads"] = [None]
    for name, values in options.items():
        if rng.random() < 0.3:
            fields[name] = rng.choice(values)
            done.append(f"{name}={fields[name]}")
    if "sliding_window" not in entry.own_fields and rng.random() < 0.25:
        fields |= {"use_sliding_window": True, "max_window_layers": rng.choice([3, 28])}
        fields["sliding_window"] = rng.choice([None, 16])
        done.append("window beyond the layers")
    return ", ".join(done) or "as saved"


def spell_tensors(rng: random.Random, tensors: Tensors, shape: Shape) -> str:
    """Which tensors are stored, by which names, in which dtypes."""
    done = []
    if shape.tied:
        stored = rng.choice(["no head", "equal head", "head alone"])
        head = tensors.pop("lm_head.weight")
        if stored == "head alone":
            del tensors["model.embed_tokens.weight"]
        if stored != "no head":
            tensors["lm_head.weight"] = head.clone()
        done.append(stored)
    prefix = rng.choice(["", "", "without", "doubled"])
    if prefix:
        for name in list(tensors):
            bare = name.removeprefix("model.")
            renamed = f"model.{name}" if prefix == "doubled" else bare
            tensors[renamed] = tensors.pop(name)
        done.append(f"prefix {prefix}")
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    kind = rng.choice([*dtypes, "mixed"])
    # Tied tensors stay equal in one dtype only.
    if kind == "mixed" and not shape.tied:
        for name in tensors:
            tensors[name] = tensors[name].to(rng.choice(dtypes))
    elif kind != "mixed":
        tensors.update({name: value.to(kind) for name, value in tensors.items()})
    done.append(str(kind))
    if rng.random() < 0.2:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        done.append("inv_freq")
    return ", ".join(done)


def write_weights(rng: random.Random, directory: Path, tensors: Tensors) -> str:
    kind = rng.choice(["whole", "shards", "partial index", "stale index", "stale index and shards"])
    if kind == "whole":
        save_file(tensors, directory / WEIGHTS)
        return kind
    names = sorted(tensors)
    rng.shuffle(names)
    count = rng.choice([1, 2, 3])
    files = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    weight_map = {name: files[i % count] for i, name in enumerate(names)}
    stale = kind.startswith("stale")
    if stale:
        save_file(tensors, directory / WEIGHTS)
    if kind != "stale index":
        for file in files:
            part = {name: tensors[name] for name in names if weight_map[name] == file}
            if stale:
                part = {name: value * 2 for name, value in part.items()}
            save_file(part, directory / file)
    if kind == "partial index":
        weight_map = dict(list(weight_map.items())[:count])
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return f"{kind} {count}"


def write_files_beside(rng: random.Random, directory: Path) -> str:
    """Files that do not change the model; all may become links, as in the hub's cache."""
    done = []
    beside = {
        "adapter_model.safetensors": b"rubbish",
        "consolidated.safetensors": b"rubbish",
        "pytorch_model.bin": b"rubbish",
        "model.gguf": b"rubbish",
        "original/model.safetensors": b"rubbish",
        "README.md": b"# \xff",
        "evil.py": b"raise SystemExit('this ran')",
        "generation_config.json": b'{"eos_token_id": [1, 2], "temperature": 0.6}',
        "preprocessor_config.json": b'{"auto_map": {"AutoProcessor": "evil.P"}}',
    }
    for name, data in beside.items():
        if rng.random() < 0.25:
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(data)
            done.append(name)
    if rng.random() < 0.15:
        add_tokenizer(directory)
        done.append("tokenizer")
    if rng.random() < 0.2:
        blobs = directory / "blobs"
        blobs.mkdir()
        for i, path in enumerate([path for path in directory.iterdir() if path.is_file()]):
            path.rename(blobs / str(i))
            path.symlink_to(Path("blobs") / str(i))
        done.append("links")
    return ", ".join(done) or "nothing beside"


assert max(PROMPT) < VOCAB
