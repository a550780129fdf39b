"""Loads a safetensors checkpoint into a model, naming whatever does not fit.

Which files are read, and which names their tensors may have, is as in transformers:
`model.safetensors` if it is there, or else all files that the index names; other files are ignored.
The headers say what there is, so nothing is allocated or read before everything is known to fit.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from nanovllm.layers.attention import AttentionBackend
from nanovllm.layers.parallel import ParallelGroup, WeightShard
from nanovllm.models.config import ModelConfig
from nanovllm.models.decoder import make_model
from nanovllm.models.stage import Model
from nanovllm.utils.device import check_fits
from nanovllm.utils.json_files import check_file, is_there, naming, read_object

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# As in the headers of safetensors files. Integers and 8-bit floats are quantized: they need scales.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
OTHER_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
PREFIX = "model."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class WeightsError(ValueError):
    """The checkpoint's tensors are not those of the model, or cannot be read."""


@dataclass(frozen=True)
class StoredTensor:
    """What the header of a file says of a tensor."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """The tensors that a directory holds, by name, as the headers of its files say."""

    directory: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Reads the headers.

        Raises:
            WeightsError: a file is missing or damaged, or two hold the same tensor.
            FileNotFoundError: there are no weights that could be read.
        """
        weight_map = _weight_map(directory)
        found: dict[str, StoredTensor] = {}
        for path in sorted(set(weight_map.values())):
            for tensor in _read_header(path):
                other = found.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise WeightsError(
                        f"tensor {tensor.name!r} is both in {other.path} and in {path}"
                    )
        for name, path in weight_map.items():
            if name and name not in found and not _is_redundant(name):
                raise WeightsError(f"{path} lacks {name!r}, which {INDEX} says it holds")
        return cls(directory, found)

    @property
    def dtype(self) -> str:
        """torch's name of the dtype that the model has if its config names none."""
        dtypes = [DTYPES[t.dtype] for t in self.tensors.values() if t.dtype in DTYPES]
        return dtypes[0] if dtypes and dtypes[0] != "float64" else "float32"

    def match(self, shards: Mapping[str, WeightShard]) -> dict[str, StoredTensor]:
        """The tensor that belongs in each shard, and the head that may be repeated beside them.

        Raises:
            WeightsError: a tensor is missing, surplus, misshaped, or of no weight's dtype.
        """
        known = {*shards, HEAD}
        matched: dict[str, StoredTensor] = {}
        for tensor in self.tensors.values():
            other = matched.setdefault(_model_name(tensor.name, known), tensor)
            if other is not tensor:
                raise WeightsError(
                    f"{tensor.path}: tensor {tensor.name!r} is the same as {other.name!r}"
                )
        if HEAD in matched and EMBEDDING not in matched and HEAD not in shards:
            # Of tied matrices, either may be the one that is stored.
            matched[EMBEDDING] = matched.pop(HEAD)
        _check_names(shards, matched, self.directory)
        shapes = {name: shard.shape for name, shard in shards.items()}
        shapes[HEAD] = shapes[EMBEDDING]
        matched = {name: tensor for name, tensor in matched.items() if name in shapes}
        for name, tensor in matched.items():
            _check_header(tensor, shapes[name])
        return matched


def load_model(
    config: ModelConfig,
    checkpoint: Checkpoint | None,
    backend: AttentionBackend,
    group: ParallelGroup,
    device: torch.device,
    dtype: torch.dtype,
    *,
    max_length: int | None = None,
    show_progress: bool = False,
    on_tensor: Callable[[], None] = lambda: None,
) -> Model:
    """A model on `device` with this rank's part of its weights.

    Args:
        checkpoint: of the weights; None: random ones, for benchmarks.
        max_length: see `DecoderForCausalLM.allocate`.
        show_progress: by a bar.
        on_tensor: called after every tensor; what it raises ends the loading.

    Raises:
        WeightsError: a tensor is missing, surplus, or misshaped, or a file is damaged.
        MemoryError: the weights do not fit into memory.
    """
    model = make_model(config, backend, group, dtype)
    shards = model.weight_shards()
    matched = {} if checkpoint is None else checkpoint.match(shards)
    # Only now are the config's sizes known to be true.
    num_bytes = sum(shard.target.nbytes for shard in shards.values())
    check_fits(num_bytes, device, f"the weights of {config.sizes()}")
    model.allocate(device, max_length)
    shards = model.weight_shards()
    if checkpoint is None:
        _fill_randomly(shards)
        return model
    names = sorted(shards, key=lambda name: matched[name].path)
    bar = tqdm(names, desc="Loading weights", unit="tensor", disable=not show_progress)
    for path, group_of_names in itertools.groupby(bar, key=lambda name: matched[name].path):
        # NOTE: a slice is made on the caller's default device.
        with torch.device("cpu"), _open(path) as file:
            for name in group_of_names:
                _fill(shards[name], file, matched[name])
                on_tensor()
    if HEAD in matched and HEAD not in shards:
        _check_tied(shards[EMBEDDING], matched[HEAD])
    return model


def _fill_randomly(shards: Mapping[str, WeightShard]) -> None:
    """Matrices are normal with deviation 0.02, norms one, biases zero; always the same."""
    for index, (name, shard) in enumerate(shards.items()):
        if shard.target.dim() == 1:
            shard.target.fill_(0 if name.endswith(".bias") else 1)
        else:
            generator = torch.Generator(shard.target.device).manual_seed(index)
            shard.target.normal_(0, 0.02, generator=generator)


def _open(path: Path) -> safe_open:
    with naming(f"{path} is truncated or damaged", WeightsError):
        return safe_open(path, framework="pt", device="cpu")


def _weight_map(directory: Path) -> dict[str, Path]:
    """The files to read, by the names of tensors that they should hold; "" for any names."""
    if is_there(directory / WEIGHTS):
        return {"": directory / WEIGHTS}
    if is_there(directory / INDEX):
        return _read_index(directory)
    others = sorted(path.name for path in directory.glob("*") if path.suffix in OTHER_SUFFIXES)
    if not others:
        raise FileNotFoundError(f"{directory} holds no *.safetensors file")
    raise FileNotFoundError(
        f"{directory} holds neither {WEIGHTS} nor {INDEX}; {_first_of(others)} is not read"
    )


def _read_index(directory: Path) -> dict[str, Path]:
    index = directory / INDEX
    wrong = f"{index} is not a safetensors index"
    try:
        weight_map = read_object(index, WeightsError).get("weight_map")
    except WeightsError as error:
        raise WeightsError(f"{wrong}: {error}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{wrong}: weight_map is no object")
    for tensor, name in weight_map.items():
        # NOTE: a path would lead out of the directory, and another kind of file may be a pickle.
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\x00]+\.safetensors", name):
            raise WeightsError(
                f"{wrong}: weight_map[{tensor!r:.200}]={name!r:.200} is no name of a safetensors "
                "file in this directory"
            )
    return {tensor: directory / name for tensor, name in weight_map.items()}


def _read_header(path: Path) -> list[StoredTensor]:
    check_file(path, WeightsError)
    with _open(path) as file, naming(f"{path} is truncated or damaged", WeightsError):
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return [
            StoredTensor(path, name, tuple(part.get_shape()), part.get_dtype())
            for name, part in slices.items()
        ]


def _model_name(name: str, known: Collection[str]) -> str:
    """The model's name of a stored tensor, whose prefix may be absent or doubled."""
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in known:
        return name.removeprefix(PREFIX)
    return PREFIX + name if PREFIX + name in known else name


def _check_names(shards: Collection[str], found: Collection[str], directory: Path) -> None:
    missing = sorted(set(shards) - set(found))
    if missing:
        raise WeightsError(f"{directory}: missing tensor {_first_of(missing)}")
    surplus = sorted(name for name in set(found) - set(shards) if not _is_redundant(name))
    if surplus:
        raise WeightsError(f"{directory}: surplus tensor {_first_of(surplus)}")


def _is_redundant(name: str) -> bool:
    """Tensors that published checkpoints repeat although the config determines them.

    A tied model's output head is its embedding, and rope frequencies follow from `rope_theta`.
    """
    return name == HEAD or name.endswith("rotary_emb.inv_freq")


def _first_of(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"


def _check_header(tensor: StoredTensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise WeightsError(
            f"{tensor.path}: tensor {tensor.name!r} has shape {tensor.shape}, expected {expected}"
        )
    if tensor.dtype not in DTYPES:
        raise WeightsError(
            f"{tensor.path}: tensor {tensor.name!r} has dtype {tensor.dtype}, expected one of "
            f"{', '.join(DTYPES)}"
        )


def _fill(shard: WeightShard, file: safe_open, tensor: StoredTensor) -> None:
    target = shard.target
    target.copy_(file.get_slice(tensor.name)[shard.index])
    if target.numel() and not all(end.isfinite() for end in target.aminmax()):
        what = f"tensor {tensor.name!r} holds NaN or infinity (as {target.dtype})"
        logger.warning("%s: %s: requests may end with finish reason 'error'", tensor.path, what)


def _check_tied(shard: WeightShard, head: StoredTensor) -> None:
    """Refuses a tied head that differs: some versions of transformers run it, others do not."""
    with torch.device("cpu"), _open(head.path) as file:
        part = file.get_slice(head.name)[shard.index].to(shard.target)
    if not torch.equal(part, shard.target):
        raise WeightsError(
            f"{head.path}: tensor {head.name!r} differs from {EMBEDDING!r}, but the config says "
            "tie_word_embeddings=True"
        )
