"""Reads a safetensors checkpoint into the slots of a model, naming whatever does not fit."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from nanovllm.layers.slots import Slot

INDEX = "model.safetensors.index.json"


class WeightsError(ValueError):
    """The checkpoint's tensors are not those of the model, or cannot be read."""


def load_weights(
    slots: dict[str, Slot],
    directory: Path,
    *,
    show_progress: bool = True,
    between: Callable[[], None] = lambda: None,
) -> None:
    """Fills every slot from the safetensors files in `directory`, reading this rank's part only.

    Args:
        slots: where each tensor goes.
        directory: of the checkpoint.
        show_progress: whether to show a progress bar.
        between: called after every tensor; what it raises ends the loading.

    Raises:
        WeightsError: a tensor is missing, surplus or misshaped, or a file is damaged.
        FileNotFoundError: there are no safetensors files.
    """
    by_file = _tensors_by_file(directory)
    found = {name for names in by_file.values() for name in names}
    _check_names(slots, found, directory)
    bar = tqdm(total=len(slots), desc="Loading weights", unit="tensor", disable=not show_progress)
    with bar:
        for path, names in by_file.items():
            with _open(path) as file:
                for name in names:
                    if name in slots:
                        _fill(slots[name], file.get_slice(name), name, path)
                        bar.update()
                        between()


def fill_randomly(slots: dict[str, Slot], seed: int = 0) -> None:
    """Random weights for benchmarks: normal with deviation 0.02, and norms of one."""
    for index, slot in enumerate(slots.values()):
        if slot.target.dim() == 1:
            slot.target.fill_(1)
        else:
            generator = torch.Generator(slot.target.device).manual_seed(seed + index)
            slot.target.normal_(0, 0.02, generator=generator)


def _tensors_by_file(directory: Path) -> dict[Path, list[str]]:
    """The names of all tensors, by the file that holds them."""
    index = directory / INDEX
    if not index.is_file():
        files = sorted(directory.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory} holds no *.safetensors file")
        by_file = {path: _names(path) for path in files}
        _refuse_duplicates(by_file)
        return by_file
    by_file = defaultdict(list)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        for name, file in weight_map.items():
            by_file[directory / file].append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{index} is not a safetensors index: {error!r}") from error
    for path, names in by_file.items():
        absent = sorted(set(names) - set(_names(path)))
        if absent:
            raise WeightsError(f"{path} lacks {absent[0]!r}, which {INDEX} says it holds")
    return dict(by_file)


def _refuse_duplicates(by_file: dict[Path, list[str]]) -> None:
    """Without an index, nothing says which of two files holds a tensor's true values."""
    holder: dict[str, Path] = {}
    for path, names in by_file.items():
        for name in names:
            if holder.setdefault(name, path) != path:
                raise WeightsError(f"tensor {name!r} is both in {holder[name]} and in {path}")


def _names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise WeightsError(f"{path} is missing")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise WeightsError(f"{path} is truncated or damaged: {error}") from error


def _check_names(slots: dict[str, Slot], found: set[str], directory: Path) -> None:
    missing = sorted(slots.keys() - found)
    if missing:
        raise WeightsError(f"{directory}: missing tensor {_first_of(missing)}")
    surplus = sorted(name for name in found - slots.keys() if not _is_redundant(name))
    if surplus:
        raise WeightsError(f"{directory}: surplus tensor {_first_of(surplus)}")


def _is_redundant(name: str) -> bool:
    """Tensors that published checkpoints repeat although the config determines them.

    A tied model's output head is its embedding, and rope frequencies follow from `rope_theta`.
    """
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _first_of(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"


def _fill(slot: Slot, stored: Any, name: str, path: Path) -> None:
    shape = tuple(stored.get_shape())
    if shape != slot.shape:
        raise WeightsError(f"{path}: tensor {name!r} has shape {shape}, expected {slot.shape}")
    part = [slice(None)] * len(shape)
    part[slot.dim] = slice(slot.start, slot.start + slot.target.shape[slot.dim])
    slot.target.copy_(stored[tuple(part)])
