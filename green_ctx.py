"""CUDA green contexts: split a GPU's SMs into disjoint partitions with a stream each.

    device = GreenDevice(0)
    with GreenContexts(device, device.split([36, 80, 16])) as contexts:
        streams = [torch.cuda.ExternalStream(handle) for handle in contexts.stream_handles]

- `Driver` alone calls `cuda.bindings.driver`, and not before the first `Driver()`.
- `GreenDevice` splits. One driver call makes all parts of a split, so they are disjoint;
  `plan_partitions` is the arithmetic of it.
- `GreenContexts` owns what is made of the parts, and closes it last first. The calls for that are
  registered before anything is made, so that an interrupt leaks nothing.

CUDA 12.4 has the API, all but `cuGreenCtxStreamCreate` (12.5), which has a documented second way.
`python green_ctx.py` shows what device 0 grants. The driver's rules are from
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GREEN__CONTEXTS.html
"""

from __future__ import annotations

import argparse
import logging
import operator
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice, starmap
from math import gcd, lcm
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

# Constants of cuda.h. As numbers, because the bindings renamed the enums that hold them.
DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the only kind a green context may have
UNKNOWN_ERROR = 999  # CUDA_ERROR_UNKNOWN
INVALID_RESOURCE_CONFIGURATION = 915  # the code for "the SMs cannot be arranged like that"

# CUDA versions, as drivers tell them, that have green contexts, and streams made on them.
GREEN_CONTEXTS, GREEN_STREAMS = 12040, 12050


class GreenContextError(RuntimeError):
    """Green contexts cannot be had here, or the driver refused a call."""


class GreenContextUnavailable(GreenContextError):
    """No bindings, no driver, a driver that is too old, or a split the device cannot make."""


class DriverError(GreenContextError):
    """A driver call that failed: its `function`, and the driver's `code` and `name` for why.

    Where the bindings raised an exception instead, that is the cause, and `code` is 999.
    """

    def __init__(self, function: str, code: int, name: str, detail: str = "") -> None:
        super().__init__(f"CUDA error code={code} ({name}) in {function}{detail and ': '}{detail}")
        self.function, self.code, self.name = function, code, name


def check_count(name: str, value: Any) -> int:
    """Returns `value` as an int; ValueError unless it is an integer, no bool, from 1 up."""
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"{name}={value!r} is not allowed: it must be an integer of at least 1")
    return count


class Driver:
    """Checked calls into `cuda.bindings.driver`, or into `bindings` if they are given.

    Raises:
        GreenContextUnavailable: no bindings, no driver library, or one without green contexts.
        DriverError: the driver does not initialise, for example because there is no device.
    """

    def __init__(self, bindings: Any = None) -> None:
        try:
            self._bindings = import_module("cuda.bindings.driver") if bindings is None else bindings
        except Exception as error:  # a broken installation may raise anything
            raise GreenContextUnavailable(f"cuda-bindings cannot be imported: {error}") from error
        try:
            self("cuInit", 0)
        except DriverError as error:
            if error.__cause__ is None:
                raise
            # How the bindings say that there is no driver library.
            raise GreenContextUnavailable(f"no CUDA driver: {error.__cause__}") from error
        version = int(self("cuDriverGetVersion"))
        self.version = f"{version // 1000}.{version % 1000 // 10}"  # the newest CUDA it supports
        # A resource query must name its type with the bindings' own enum.
        types = getattr(self._bindings, "CUdevResourceType", None)
        self.sm_type = getattr(types, "CU_DEV_RESOURCE_TYPE_SM", None)
        if version < GREEN_CONTEXTS or self.sm_type is None:
            raise GreenContextUnavailable(
                "driver and cuda-bindings must be for CUDA 12.4 or newer; the driver is for "
                f"{self.version}"
            )
        has_call = hasattr(self._bindings, "cuGreenCtxStreamCreate")
        self.has_green_streams = version >= GREEN_STREAMS and has_call

    def __call__(self, function: str, *args: Any, answer: list[Any] | None = None) -> Any:
        """`driver("cuDeviceGet", 0)` returns the function's one output, or a tuple of several.

        What the function answered, a tuple of status and outputs, becomes the one item of `answer`.
        """
        answer = [] if answer is None else answer
        try:
            # NOTE: one step of the interpreter calls the function and keeps its answer. A signal
            # that comes during the call is raised after that step, and no handle is lost.
            answer[:] = starmap(getattr(self._bindings, function), [args])
            status, *outputs = answer[0]
            code, name = int(status), str(getattr(status, "name", "unknown"))
        except Exception as error:  # whatever the bindings raise, the call has failed
            answer.clear()
            kind = type(error).__name__
            raise DriverError(function, UNKNOWN_ERROR, kind, str(error)) from error
        if code != 0:
            raise DriverError(function, code, name)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


@dataclass(frozen=True)
class Granularity:
    """The sizes of groups a device makes: `minimum` SMs or more, in multiples of `alignment`."""

    minimum: int
    alignment: int

    def round_up(self, count: int, groups: int = 1) -> int:
        """SMs in the smallest group of at least `count`, when `groups` come from one split.

        One split makes equal units, of `minimum` SMs or more, and several groups are sums of them.
        """
        step = self.alignment if groups <= 1 else lcm(self.alignment, self.minimum)
        return max(self.minimum, -(-count // step) * step)

    def units(self, sizes: Sequence[int]) -> Iterator[int]:
        """Sizes of equal units that make up all of `sizes`, largest first."""
        largest = gcd(*sizes)
        for parts in range(1, largest // self.minimum + 1):
            if largest % (parts * self.alignment) == 0:
                yield largest // parts


def plan_partitions(
    total: int, granularity: Granularity, counts: Sequence[int], names: Sequence[str] = ()
) -> list[int | None]:
    """SMs of each part: as many as wanted, rounded up to what a device of `total` can make.

    Each part is an aligned group if all fit. If they do not, or if they fill the device, one part
    is the whole remainder (None): the first part if possible, else the next that can. A remainder
    need not be a multiple of the alignment, and promises no co-scheduled SMs: kernels launched in
    clusters, as cuBLAS does, may fail on a small one.

    Raises:
        ValueError: no counts, one that is no positive integer, or too many for the device.
    """
    if not counts:
        raise ValueError(f"counts={counts!r} is not allowed: there must be one at least")
    names = names or [f"counts[{i}]" for i in range(len(counts))]
    counts = [check_count(name, count) for name, count in zip(names, counts, strict=True)]
    aligned = [granularity.round_up(count, len(counts)) for count in counts]
    # With one group less, for a part that is the remainder.
    groups = [granularity.round_up(count, len(counts) - 1) for count in counts]
    needed = [sum(groups) - group + count for group, count in zip(groups, counts, strict=True)]
    if sum(aligned) <= total and needed[0] != total:
        return [*aligned]
    for i, sms in enumerate(needed):
        if sms <= total:
            return [*groups[:i], None, *groups[i + 1 :]]
    fields = " and ".join(f"{name}={count}" for name, count in zip(names, counts, strict=True))
    raise ValueError(
        f"{fields} are not allowed: with groups of {granularity.alignment} SMs they need "
        f"{min(needed)} SMs, and the device has {total}"
    )


class SmResource(NamedTuple):
    """SMs that a split granted: how many, and the driver's handles for them."""

    sm_count: int
    handles: tuple[Any, ...]


class GreenDevice:
    """One GPU whose `sm_count` SMs can be split; `ordinal` is its number for CUDA and torch."""

    def __init__(self, ordinal: int = 0, driver: Driver | None = None) -> None:
        self.ordinal = ordinal
        self.driver = driver = Driver() if driver is None else driver
        self.handle: Any = driver("cuDeviceGet", self.ordinal)
        self._sms: Any = driver("cuDeviceGetDevResource", self.handle, driver.sm_type)
        self.sm_count = int(self._sms.sm.smCount)

    def granularity(self) -> Granularity:
        """Minimum and alignment of groups, by what the driver grants to who asks for too little."""
        minimum = self._granted(1)
        if minimum == 0:
            raise GreenContextUnavailable(f"{self} cannot be split")
        above = self._granted(minimum + 1) if minimum < self.sm_count else 0
        return Granularity(minimum, above - minimum if above else minimum)

    def split(self, counts: Sequence[int], names: Sequence[str] = ()) -> list[SmResource]:
        """Splits the device into disjoint parts, one for each of `counts` and in their order.

        `plan_partitions` says what SMs each part gets; errors call the counts by their `names`.

        Raises:
            ValueError: see `plan_partitions`.
            GreenContextUnavailable: the device has the SMs but cannot arrange them like that.
            DriverError: the driver refused for another reason.
        """
        granularity = self.granularity()
        plan = plan_partitions(self.sm_count, granularity, counts, names)
        sizes = [size for size in plan if size is not None]
        if not sizes:  # the one part is the whole device
            return [SmResource(self.sm_count, (self._sms,))]
        # NOTE: a group or remainder cannot be split again before a green context was made of it
        # (error 915), but a context may be made of several groups of one split. So unequal groups
        # are put together from equal units, the larger the better, as neighbours stay together.
        for unit in granularity.units(sizes):
            number = sum(sizes) // unit
            units, rest = self._split_evenly(number, unit)
            if [int(group.sm.smCount) for group in units] == [unit] * number:
                deal = iter(units)
                return [
                    SmResource(size, tuple(islice(deal, size // unit)))
                    if size is not None
                    else SmResource(int(rest.sm.smCount), (rest,))
                    for size in plan
                ]
        raise GreenContextUnavailable(f"{self} cannot make groups of {sizes} SMs")

    def _split_evenly(self, groups: int, count: int) -> tuple[list[Any], Any]:
        """Splits off up to `groups` groups of `count` SMs or more. Returns them and the rest."""
        try:
            made, number, rest = self.driver(
                "cuDevSmResourceSplitByCount", groups, self._sms, 0, count
            )
        except DriverError as error:
            if error.code != INVALID_RESOURCE_CONFIGURATION:
                raise
            return [], self._sms
        return list(made)[: int(number)], rest

    def _granted(self, count: int) -> int:
        """SMs the driver grants when asked for one group of `count`; 0 if it makes none."""
        groups, _ = self._split_evenly(1, count)
        return int(groups[0].sm.smCount) if groups else 0

    def __str__(self) -> str:
        return f"device {self.ordinal} with {self.sm_count} SMs"


def close_after_error(owner: Any) -> None:
    """Calls `owner.close()` while an exception is on its way, which no failure may hide."""
    try:
        owner.close()
    except DriverError as error:
        logger.warning("A driver call failed while others were undone: %s", error)


@dataclass(frozen=True)
class Undo:
    """A call of `function`, due once the call that answered `made` has succeeded."""

    function: str
    made: list[Any]
    answer: list[Any] = field(default_factory=list)

    def run(self, driver: Driver) -> None:
        """Makes the call if it is due: until it has succeeded once."""
        made, done = ([status for status, *_ in call] == [0] for call in (self.made, self.answer))
        if made and not done:
            driver(self.function, *self.made[0][1:], answer=self.answer)


class GreenContexts:
    """Owner of green contexts with a stream each, made of the parts of `device.split`.

    The current CUDA context stays as it was.

    Attributes:
        sms: SMs of each, as the driver reports them of the finished green contexts.
        stream_handles: the driver's handle (CUstream) of each one's stream.
        closed: whether streams and contexts are gone.

    Raises:
        DriverError: the driver refused; whatever had been made until then is destroyed again.
    """

    def __init__(self, device: GreenDevice, parts: Sequence[SmResource]) -> None:
        self.device = device
        self.closed = False
        self._undo: list[Undo] = []
        try:
            self.sms, self.stream_handles = zip(*map(self._make_partition, parts), strict=True)
        except BaseException:
            close_after_error(self)
            raise

    def close(self) -> None:
        """Waits for the streams, destroys them and the green contexts. May be called twice.

        What was captured on the streams, such as CUDA graphs, must be gone before.

        Raises:
            DriverError: the first call that failed; all the others were made all the same.
        """
        self.closed = True
        try:
            while self._undo:
                self._undo[-1].run(self.device.driver)
                self._undo.pop()
        except BaseException as error:
            if isinstance(error, DriverError):
                self._undo.pop()  # what cannot be destroyed is not tried again
            close_after_error(self)  # goes on with the rest
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _make_partition(self, part: SmResource) -> tuple[int, int]:
        """Makes a green context with a stream; returns its SMs and the stream's handle."""
        driver, handles = self.device.driver, list(part.handles)
        # NOTE: the driver has no call to free a descriptor; it lives as long as the process.
        descriptor = driver("cuDevResourceGenerateDesc", handles, len(handles))
        create = "cuGreenCtxCreate", descriptor, self.device.handle, DEFAULT_STREAM
        context = self._make(*create, undo=["cuGreenCtxDestroy"])
        granted = driver("cuGreenCtxGetDevResource", context, driver.sm_type)
        return int(granted.sm.smCount), int(self._make_stream(context))

    def _make_stream(self, context: Any) -> Any:
        """Creates a stream on a green context; leaves the thread's current context as it was."""
        driver, destroy = self.device.driver, ["cuStreamSynchronize", "cuStreamDestroy"]
        if driver.has_green_streams:
            return self._make("cuGreenCtxStreamCreate", context, NON_BLOCKING, 0, undo=destroy)
        as_context = driver("cuCtxFromGreenCtx", context)
        self._make("cuCtxPushCurrent", as_context, undo=["cuCtxPopCurrent"])
        pop = self._undo[-1]
        stream = self._make("cuStreamCreateWithPriority", NON_BLOCKING, 0, undo=destroy)
        # NOTE: after a pop that failed, the thread would go on with a context that is about to be
        # destroyed. So it stays registered, and closing tries it once more.
        pop.run(driver)
        return stream

    def _make(self, function: str, *args: Any, undo: Sequence[str]) -> Any:
        """Calls `function`; closing calls the functions `undo` with what it made, in that order."""
        made: list[Any] = []
        # Registered before the call, for an interrupt right after it.
        self._undo += [Undo(name, made) for name in reversed(undo)]
        return self.device.driver(function, *args, answer=made)


def main() -> int:
    """Prints what device 0 grants for a few requests. Returns the exit status."""
    try:
        device = GreenDevice(0)
        sizes, total = device.granularity(), device.sm_count
        print(f"{device}, driver for CUDA {device.driver.version}")
        print(f"groups of {sizes.minimum} SMs or more, in multiples of {sizes.alignment}")
        for count in (1, 12, 16, 36, total * 3 // 4):
            if sizes.round_up(count) <= total:
                granted = device.split([count])[0].sm_count
                print(f"{count:>6} asked {granted:>6} granted {total - granted:>6} left")
    except GreenContextError as error:
        print(f"green contexts are not available: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    sys.exit(main())
