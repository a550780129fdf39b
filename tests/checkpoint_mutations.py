"""Damage to a checkpoint, drawn from a seed: to each file's bytes, its JSON, its tensors, its kind.

what = mutate(directory, random.Random(seed))
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanovllm.models.rope import ROPES
from nanovllm.tiny import CHECKPOINT_DIR
from tests.checkpoints import FIELD_NAMES, TABLE, edit_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
EVIL: list[Any] = [
    *[None, True, False, 0, 1, -1, 2, 3, 7, 64, 512, 2**31, 2**31 - 1, 2**63, 10**30, -(2**40)],
    *[0.0, -0.0, 1.0, 0.5, 512.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf")],
    *["", "x", "0", "64", "false", "true", "linear", *ROPES, *TABLE, "silu", "swish", "gelu"],
    *["bfloat16", "torch.bfloat16", "float64", "int8", "half", "auto", "../x", "/etc/passwd"],
    *["\ud800", "a" * 10_000, "evil.Evil", "full_attention", "sliding_attention", "Qwen3Model"],
    *["F64", "BF16", "I8", "C64", [2**62, 4], [-1, 3], [0, 2**63], "lm_head.weight"],
    *[[], {}, [1], [None], ["full_attention"], {"rope_type": "yarn"}, {"a": {"b": {}}}, [[[]]]],
]
# What reading a damaged file raises beyond that.
DAMAGED = (struct.error, SafetensorError, AttributeError)
KEYS = [
    *FIELD_NAMES,
    *["type", "architectures", "model_type", "auto_map"],
    *["tokenizer_class", "eos_token", "added_tokens_decoder", "vocab_file", "tokenizer_file"],
    *["fast_tokenizer_files", "gguf_file", "chat_template", "extra_special_tokens", "model"],
    *["lm_head.weight", "dtype", "shape", "data_offsets", "__metadata__"],
    *["weight_map", "metadata", "use_fast", "init_inputs", "backend", "tokenizer_object"],
]


def add_tokenizer(directory: Path, *, fast: bool = True) -> None:
    """The embedded model's tokenizer; if not `fast`, in its vocabulary and merges alone."""
    for name in TOKENIZER_FILES:
        shutil.copy(CHECKPOINT_DIR / name, directory)
    model = json.loads((CHECKPOINT_DIR / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    extra = {
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "added_tokens.json": {"<|im_end|>": 1, "<|endoftext|>": 0},
    }
    for name, value in extra.items():
        (directory / name).write_text(json.dumps(value))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    if not fast:
        (directory / "tokenizer.json").unlink()
        edit_json(directory / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")


def mutate(directory: Path, rng: random.Random) -> str:
    """Damages one file of a checkpoint; returns what was done."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files = [path for path in files if path.suffix in (".json", ".txt", ".safetensors", ".jinja")]
    # config.json and the weights have most to get wrong, and files that are not read nothing.
    weights = [4.0 if path.name.startswith(("config", "model")) else 1.0 for path in files]
    for i, path in enumerate(files):
        if path.parent != directory or path.name.startswith(("adapter", "consol", "preproc")):
            weights[i] = 0.1
    (path,) = rng.choices(files, weights)
    kinds: list[tuple[Callable[[Path, random.Random], str], int]] = [
        (damage_bytes, 3),
        (replace_file, 1),
    ]
    if path.suffix == ".json":
        kinds.append((damage_json, 12))
    if path.suffix == ".safetensors" and path.stat().st_size > 100:
        kinds += [(damage_header, 5), (damage_tensors, 5)]
    (kind,) = rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])
    try:
        return f"{path.name}: {kind(path, rng)}"
    except (ValueError, LookupError, TypeError, RecursionError, OSError, *DAMAGED) as error:
        return f"{path.name}: already damaged ({type(error).__name__})"


def damage_bytes(path: Path, rng: random.Random) -> str:
    data = path.read_bytes()
    # The header of a safetensors file is where a flipped bit matters most.
    where = rng.randrange(min(len(data), rng.choice([8, 2000, len(data) + 1])) + 1)
    before, after, text = data[:where], data[where:], data.decode("latin-1")
    inserted = rng.choice([b"\0", b"\xff\xfe", b"{", b'"', b"9" * 5000, b"e999", b","])
    kinds = {
        "cut": before,
        "flip": before + bytes(byte ^ 1 << rng.randrange(8) for byte in after[:1]) + after[1:],
        "insert": before + inserted + after,
        "append": data + rng.choice([b"\0" * 100, b"}", b"[]", b"\n\n"]),
        "rubbish": rng.randbytes(rng.choice([1, 8, 9, 500])),
        "empty": b"",
        "encoding": text.encode(rng.choice(["utf-16", "utf-8-sig"])),
        "deep": rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"[" * 500 + b"]" * 500]),
    }
    kind = rng.choice(list(kinds))
    _write(path, kinds[kind])
    return f"bytes {kind} at {where}"


def replace_file(path: Path, rng: random.Random) -> str:
    """Something else in the file's place."""
    kind = rng.choice(["nothing", "fifo", "directory", "dangling", "loop", "zero", "other"])
    other = rng.choice(sorted(path.parent.iterdir()))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "other" and other.exists():
        path.symlink_to(other.name)
        kind = f"a link to {other.name}"
    return f"replaced by {kind}"


def damage_json(path: Path, rng: random.Random) -> str:
    root = json.loads(path.read_text())
    what = _damage(root, rng)
    _write(path, json.dumps(root).encode())
    return what


def damage_header(path: Path, rng: random.Random) -> str:
    """The same of a safetensors file, before the same data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    what = _damage(header, rng)
    text = json.dumps(header).encode()
    size = len(text)
    if rng.random() < 0.1:
        size = rng.choice([0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1])
    _write(path, struct.pack("<Q", size) + text + data[8 + length :])
    return f"header of {size}: {what}"


def _damage(root: Any, rng: random.Random) -> str:
    """Changes one place within a JSON value."""
    places = list(_places(root))
    # Large vocabularies would leave little for the rest.
    shallow = [place for place in places if place[2] <= 2]
    container, key, _ = rng.choice(shallow if rng.random() < 0.7 else places)
    kind = rng.choice(["set", "set", "set", "drop", "add", "add", "rename", "tweak", "swap"])
    value = rng.choice(EVIL)
    if kind == "drop":
        del container[key]
    elif kind == "add" and isinstance(container, dict):
        key = rng.choice(KEYS)
        container[key] = value
    elif kind == "rename" and isinstance(container, dict):
        container[rng.choice([*KEYS, str(key) + "x"])] = container.pop(key)
    elif kind == "tweak":
        container[key] = value = _tweaked(container[key], rng)
    elif kind == "swap":
        other, at, _ = rng.choice(places)
        container[key], other[at] = other[at], container[key]
    else:
        container[key] = value
    return f"{kind} {key!s:.60} {value!r:.60}"


def _places(value: Any, depth: int = 0) -> Any:
    """(container, key, depth) of everything within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key, depth
        if isinstance(item, (dict, list)):
            yield from _places(item, depth + 1)


def _tweaked(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bool):
        return rng.choice([not value, int(value), str(value).lower(), None])
    if isinstance(value, (int, float)):
        return rng.choice([value + 1, value - 1, value * 2, -value, float(value), str(value)])
    if isinstance(value, str):
        return rng.choice([value + "x", value[:-1], value.upper(), [value], "../" + value])
    return rng.choice([[value], {"a": value}, str(value)])


def damage_tensors(path: Path, rng: random.Random) -> str:
    """A sound file of other tensors."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.choice(["drop", "add", "rename", "shape", "dtype", "values", "cast"])
    what: Any = None
    if kind == "drop":
        del tensors[name]
    elif kind == "add":
        suffix = rng.choice(["_scale", "_scale_inv", ".bias", "x"])
        what = rng.choice(["lm_head.weight", "input_scale", name.replace(".weight", suffix)])
        tensors[what] = torch.ones(rng.choice([(1,), tensor.shape]))
    elif kind == "rename":
        what = rng.choice([name.removeprefix("model."), "model." + name, name.upper(), name + "s"])
        tensors[what] = tensors.pop(name)
    elif kind == "shape":
        new = [tensor.t() if tensor.dim() == 2 else tensor[None], tensor[:-1], tensor.flatten()]
        tensors[name] = rng.choice(new).contiguous().clone()
    elif kind == "dtype":
        dtypes = [torch.int8, torch.int32, torch.bool, torch.uint8, torch.float8_e4m3fn]
        tensors[name] = tensor.to(rng.choice(dtypes))
    elif kind == "cast":
        tensors[name] = tensor.to(rng.choice([torch.float64, torch.float16, torch.bfloat16]))
    else:
        tensor = tensor.clone()
        what = rng.choice([float("nan"), float("inf"), 0.0, 3.0, 1e30])
        tensor.view(-1)[rng.randrange(tensor.numel())] = what
        tensors[name] = tensor
    _write(path, b"")
    save_file(tensors, path)
    return f"tensors {kind} {name} {what}"


def _write(path: Path, data: bytes) -> None:
    """In place of the file, not through a link to another one."""
    path.unlink()
    path.write_bytes(data)
