"""Several arrays of int32 in one: their number, their sizes, then all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.array([len(arrays), *map(len, arrays)], np.int32), *arrays])


def joined_size(joined: np.ndarray) -> int:
    """Integers in all, of which `joined` may be the first few."""
    count = int(joined[0])
    return 1 + count + int(joined[1 : 1 + count].sum())


def split(joined: np.ndarray) -> list[np.ndarray]:
    """The inverse of `join`, as views; what follows in `joined` is left out."""
    count = int(joined[0])
    ends = joined[1 : 1 + count].cumsum()
    return np.split(joined[1 + count :], ends)[:-1]
