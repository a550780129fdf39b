"""Which matrix product is fastest on a partition: measured once for each shape, kept on disk.

    choices = DenseChoices(torch.cuda.get_device_name(), timer)
    choices.fastest(DenseShape(512, 24576, 4096, num_sms=96, dtype="bfloat16", gated=True))

Candidates are cuBLAS as torch calls it, which plans for all SMs of the device; cuBLASLt, told how
many SMs there are; and the Triton kernel of `kernels.partition_gemm` with the tunings that its
cost model leaves. No rule tells which of them wins, so all are timed. How is up to the caller,
who gives a timer: it knows the partition's stream, and a test can fake it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from nanovllm.kernels.gemm_tunings import GemmTuning, candidates
from nanovllm.utils.disk_cache import DiskCache

logger = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float16", "float32")
LIBRARIES = ("cublas", "cublaslt")
# NOTE: on 12 SMs of an H200, cuBLAS ended in CUBLAS_STATUS_EXECUTION_FAILED: its kernels launch
# clusters of thread blocks, which a small partition cannot place.
_FEWEST_LIBRARY_SMS = 16
_MOST_TUNINGS = 10


@dataclass(frozen=True)
class DenseShape:
    """A product ``x [rows, inner] @ weight [features, inner].T`` on a partition.

    Args:
        rows: N, the batch size.
        features: M, rows of the weight; of both halves of a gated one.
        inner: K.
        num_sms: SMs granted to the partition.
        dtype: "bfloat16", "float16" or "float32".
        gated: whether ``silu(gate) * up`` follows, for a weight whose first half is the gate.

    Raises:
        ValueError: a size is under 1, or the dtype is none of these.
    """

    rows: int
    features: int
    inner: int
    num_sms: int
    dtype: str
    gated: bool = False

    def __post_init__(self) -> None:
        for name in ("rows", "features", "inner", "num_sms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
        if self.gated and self.features % 2:
            raise ValueError(f"features is {self.features}; a gated weight's must be even")


@dataclass(frozen=True)
class DenseChoice:
    """An implementation of a product.

    Attributes:
        library: "cublas", "cublaslt" or "triton".
        tuning: of the Triton kernel; None for the libraries.
    """

    library: str
    tuning: GemmTuning | None = None


# Seconds of one product by that implementation; infinite if it cannot do it.
DenseTimer = Callable[[DenseShape, DenseChoice], float]


def implementations(shape: DenseShape, *, hopper: bool = True) -> list[DenseChoice]:
    """What to time for a shape, at most 12.

    Args:
        hopper: whether the GPU copies tiles in bulk (compute capability 9).
    """
    libraries = LIBRARIES if shape.num_sms >= _FEWEST_LIBRARY_SMS else ()
    tunings = candidates(
        shape.rows,
        shape.features,
        shape.inner,
        shape.num_sms,
        element_size=4 if shape.dtype == "float32" else 2,
        hopper=hopper,
        limit=_MOST_TUNINGS,
    )
    return [
        *(DenseChoice(library) for library in libraries),
        *(DenseChoice("triton", tuning) for tuning in tunings),
    ]


class DenseChoices:
    """The fastest implementation of each shape, timed when it is first asked for.

    Args:
        device: the GPU's name.
        timer: times an implementation of a shape.
        versions: of what the times depend on, such as torch and Triton, by name.
        hopper: whether the GPU copies tiles in bulk (compute capability 9).
        cache: where choices are kept between runs; default: the user's cache folder.
    """

    def __init__(
        self,
        device: str,
        timer: DenseTimer,
        versions: dict[str, str],
        *,
        hopper: bool = True,
        cache: DiskCache | None = None,
    ) -> None:
        self.device = device
        self.timer = timer
        self.versions = versions
        self.hopper = hopper
        self.cache = DiskCache("dense") if cache is None else cache
        self._known: dict[DenseShape, DenseChoice] = {}

    def fastest(self, shape: DenseShape) -> DenseChoice:
        """The implementation to use for a shape: known, kept on disk, or timed now.

        cuBLAS if none could be timed; that is not kept.
        """
        if shape not in self._known:
            key = {"device": self.device, **self.versions, **asdict(shape)}
            choice = self._read(key)
            if choice is None:
                choice = self._measure(shape, key)
            self._known[shape] = choice
        return self._known[shape]

    def _read(self, key: dict[str, Any]) -> DenseChoice | None:
        kept = self.cache.read(key)
        if kept is None:
            return None
        try:
            return _parse(kept)
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("Cache of %s: not a choice: %r", self.cache.name, error)
            return None

    def _measure(self, shape: DenseShape, key: dict[str, Any]) -> DenseChoice:
        options = implementations(shape, hopper=self.hopper)
        seconds = [self.timer(shape, option) for option in options]
        usable = [(time, i) for i, time in enumerate(seconds) if 0 < time < math.inf]
        if not usable:
            logger.warning("No implementation of %s could be timed; using cuBLAS", shape)
            return DenseChoice("cublas")
        time, best = min(usable)
        self.cache.write(key, {**asdict(options[best]), "seconds": time})
        return options[best]


def _parse(kept: dict[str, Any]) -> DenseChoice:
    """The choice in a cache entry; KeyError, TypeError or ValueError if there is none."""
    library, tuning = kept["library"], kept["tuning"]
    if library in LIBRARIES and tuning is None:
        return DenseChoice(library)
    if library != "triton":
        raise ValueError(f"library {library!r} with tuning {tuning!r}")
    for field in fields(GemmTuning):
        # An exact match: True is an int, too, and a wrong tuning would not compile, or worse.
        if type(tuning[field.name]) is not type(getattr(_EXAMPLE, field.name)):
            raise TypeError(f"{field.name} is {tuning[field.name]!r}")
    return DenseChoice(library, GemmTuning(**tuning))


_EXAMPLE = GemmTuning(128, 128, 64, num_warps=8, num_stages=4)
