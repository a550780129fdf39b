"""Arrays of int32, int64 and float32 as one of int32, for one copy to a device or to other ranks.

    number of arrays, 0 | kind and size of each | each, and a 0 if its size is odd

So all begin at a multiple of 8 bytes, also in arrays of arrays. Sizes are in int32s.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from nanovllm.utils.device import to_device

KINDS = [(np.dtype(np.int32), torch.int32), (np.dtype(np.int64), torch.int64),
         (np.dtype(np.float32), torch.float32)]  # fmt: skip
_NUMBERS = {kind: number for number, (kind, _) in enumerate(KINDS)}
_ODD = np.zeros(1, np.int32)


def join(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """One array of several, each of one dimension."""
    head, parts = [0, 0], list[np.ndarray]()
    for array in arrays:
        part = array.view(np.int32)
        head += (_NUMBERS[array.dtype], len(part))
        parts += (part, _ODD[: len(part) % 2])
    head[0] = len(parts) // 2
    return np.concatenate([np.array(head, np.int32), *parts])


def joined_size(joined: np.ndarray) -> int:
    """Integers in all, of which `joined` may be the first few."""
    count = int(joined[0])
    sizes = joined[3 : 2 + 2 * count : 2]
    return 2 + 2 * count + int((sizes + sizes % 2).sum())


def split(joined: np.ndarray, device: torch.device | None = None) -> list[Any]:
    """The inverse of `join`: arrays, as views, or tensors on `device`, which is not waited for.

    What follows in `joined` is left out.
    """
    words = joined if device is None else to_device(joined, device)
    place, parts = 2 + 2 * int(joined[0]), []
    for kind, size in joined[2:place].reshape(-1, 2).tolist():
        parts.append(words[place : place + size].view(KINDS[kind][device is not None]))
        place += size + size % 2
    return parts
