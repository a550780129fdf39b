"""CUDA green contexts: split a GPU's SMs into disjoint partitions with streams of their own.

    device = GreenDevice(0)
    split = device.split([96])                       # an aligned group, and what is left
    with Partition(device, split.groups[0]) as dense, Partition(device, split.remainder) as rest:
        with torch.cuda.stream(dense.torch_stream()): ...

The design in a few lines:
- `Driver` is the only place that calls `cuda.bindings.driver`, and it turns every failure, by
  status or by exception, into a `DriverError`. Nothing is imported or called before the first
  `Driver()` is made.
- `GreenDevice` asks the driver for SM count, minimum and alignment, and splits. What it reports
  was granted, not asked for. One driver call makes all parts of a `Split`, so they are disjoint.
- `Partition` owns one green context and its streams and closes them in the right order: `Undo` has
  the calls for it, registered before anything is made, so that an interrupt leaks nothing. A
  `Lease` keeps it open while something, such as a captured CUDA graph, still needs it.
- CUDA 12.4 has the API, all but `cuGreenCtxStreamCreate` (12.5), which has a documented second way.

Run `python green_ctx.py` to see what device 0 grants. The driver's rules are from
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__GREEN__CONTEXTS.html
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from itertools import islice, starmap
from math import gcd, lcm
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

# Constants of cuda.h. As numbers, because the bindings renamed the enums that hold them.
IGNORE_SM_COSCHEDULING = 1  # CU_DEV_SM_RESOURCE_SPLIT_IGNORE_SM_COSCHEDULING
DEFAULT_STREAM = 1  # CU_GREEN_CTX_DEFAULT_STREAM
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: the only kind a green context may have
NOT_FOUND, NOT_SUPPORTED = 500, 801  # how older drivers say that they lack a function
UNKNOWN_ERROR = 999  # CUDA_ERROR_UNKNOWN
INVALID_RESOURCE_CONFIGURATION = 915  # the code for "the SMs cannot be arranged like that"

REQUIRED_FUNCTIONS = (
    "cuDeviceGetDevResource",
    "cuDevSmResourceSplitByCount",
    "cuDevResourceGenerateDesc",
    "cuGreenCtxCreate",
    "cuGreenCtxDestroy",
    "cuGreenCtxGetDevResource",
)


class GreenContextError(RuntimeError):
    """Green contexts cannot be had here, or the driver refused a call."""


class GreenContextUnavailable(GreenContextError):
    """No bindings, no driver, a driver that is too old, or a split the device cannot make."""


class DriverError(GreenContextError):
    """A driver call that failed: its `function`, and the driver's `code` and `name` for why.

    Where the bindings raised an exception instead, it is the cause, `name` is its type, and `code`
    is 999.
    """

    def __init__(self, function: str, code: int, name: str, detail: str = "") -> None:
        super().__init__(f"CUDA error code={code} ({name}) in {function}{detail and ': '}{detail}")
        self.function, self.code, self.name = function, code, name


class PartitionInUse(RuntimeError):
    """A partition cannot be closed while a lease on it is held."""


class PartitionClosed(RuntimeError):
    """A partition was used after it had been closed."""


def check_integer(name: str, value: object, minimum: int | None = None) -> None:
    """Raises ValueError unless `value` is an integer, not a bool, and at least `minimum`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (minimum is not None and value < minimum):  # type: ignore[operator]
        allowed = "an integer" if minimum is None else f"an integer of at least {minimum}"
        raise ValueError(f"{name}={value!r} is not allowed: it must be {allowed}")


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
        self.version = int(self("cuDriverGetVersion"))
        missing = [name for name in REQUIRED_FUNCTIONS if not self.has(name)]
        # A resource query must name its type with the bindings' own enum.
        types = getattr(self._bindings, "CUdevResourceType", None)
        self.sm_type = getattr(types, "CU_DEV_RESOURCE_TYPE_SM", None)
        if missing or self.sm_type is None:
            raise GreenContextUnavailable(
                "driver and cuda-bindings must be for CUDA 12.4 or newer; "
                f"the driver is for {self.version_text}; "
                f"missing: {', '.join(missing or ['CU_DEV_RESOURCE_TYPE_SM'])}"
            )

    @property
    def version_text(self) -> str:
        """The newest CUDA version the driver supports, such as "13.0"."""
        return f"{self.version // 1000}.{self.version % 1000 // 10}"

    def __call__(self, function: str, *args: Any, answer: list[Any] | None = None) -> Any:
        """`driver("cuDeviceGet", 0)` returns the function's one output, or a tuple of several.

        An empty list `answer` gets the status and the outputs, as one tuple.
        """
        answer = [] if answer is None else answer
        try:
            # NOTE: one step of the interpreter calls the function and keeps its answer. An
            # interrupt comes before or after, and never loses a handle that was made.
            answer.extend(starmap(getattr(self._bindings, function), [args]))
            status, *outputs = answer[0]
            code, name = int(status), str(getattr(status, "name", "unknown"))
        except Exception as error:  # whatever the bindings raise, the call has failed
            answer.clear()
            kind = type(error).__name__
            raise DriverError(function, UNKNOWN_ERROR, kind, str(error)) from error
        if code != 0:
            raise DriverError(function, code, name)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def has(self, function: str) -> bool:
        """Whether both the bindings and the driver know `function`."""
        if not hasattr(self._bindings, function):
            return False
        try:
            address, _ = self("cuGetProcAddress", function.encode(), self.version, 0)
        except DriverError as error:
            if error.code not in (NOT_FOUND, NOT_SUPPORTED):
                raise
            return False
        return bool(address)


class Closable(Protocol):
    """Something with handles of the driver."""

    def close(self) -> None:
        """Destroys them; DriverError if a call failed."""


def close_after_error(owner: Closable) -> None:
    """Closes while an exception is on its way, which no failure may hide."""
    try:
        owner.close()
    except DriverError as error:
        logger.warning("A driver call failed while others were undone: %s", error)


@dataclass(frozen=True)
class UndoCall:
    """A call of `function` with what the driver answered when something was made.

    The call is due while there is such an answer, and none yet to the call itself.
    """

    function: str
    made: list[Any]
    done: list[Any] = field(default_factory=list)

    def run(self, driver: Driver) -> None:
        """Makes the call, if it is due; one that fails is due again."""
        if self.made and self.made[0][0] == 0 and not self.done:
            try:
                driver(self.function, *self.made[0][1:], answer=self.done)
            except DriverError:
                self.done.clear()
                raise


class Undo:
    """The driver calls that undo what was made, run last first when it closes."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._calls: list[UndoCall] = []

    def make(self, function: str, *args: Any, undo: Sequence[str]) -> Any:
        """Calls `function`; functions `undo`, in that order, will take what it returned."""
        made: list[Any] = []
        # Registered before the call, for an interrupt right after it.
        self._calls += [UndoCall(name, made) for name in reversed(undo)]
        return self._driver(function, *args, answer=made)

    def run_early(self, function: str) -> None:
        """Makes the last registered call of `function` now; if it fails, closing tries again."""
        next(call for call in reversed(self._calls) if call.function == function).run(self._driver)

    def close(self) -> None:
        """Makes every call, though some fail, and raises the first error. May be called twice."""
        run_all([self._run, self._run])  # the second goes on where an interrupt ended the first

    def _run(self) -> None:
        errors: list[BaseException] = []
        while self._calls:
            try:
                self._calls[-1].run(self._driver)
            except DriverError as error:
                errors.append(error)
            self._calls.pop()
        raise_first(errors)


def run_all(actions: Iterable[Callable[[], None]]) -> None:
    """Runs every action, though some fail, and raises the first error."""
    errors: list[BaseException] = []
    for action in actions:
        try:
            action()
        except BaseException as error:
            errors.append(error)
    raise_first(errors)


def raise_first(errors: Sequence[BaseException]) -> None:
    """Raises the first of these, but an interrupt before any error; nothing if there is none."""
    for error in sorted(errors, key=lambda error: isinstance(error, Exception)):
        raise error


@dataclass(frozen=True)
class Granularity:
    """The sizes of groups a device makes: `minimum` SMs or more, in multiples of `alignment`."""

    minimum: int
    alignment: int

    def round_up(self, count: int, groups: int = 1) -> int:
        """SMs in the smallest group of at least `count`, when `groups` come from one split.

        One split makes equal units, of `minimum` SMs or more, and several groups are sums of them.
        """
        step = self.alignment if groups == 1 else lcm(self.alignment, self.minimum)
        return max(self.minimum, -(-count // step) * step)

    def units(self, sizes: Sequence[int]) -> Iterator[int]:
        """Sizes of equal units that make up all of `sizes`, largest first."""
        largest = gcd(*sizes)
        for parts in range(1, largest // self.minimum + 1):
            if largest % (parts * self.alignment) == 0:
                yield largest // parts


@dataclass(frozen=True)
class SmResource:
    """SMs that a split granted: how many, and the driver's handles for them."""

    sm_count: int
    handles: tuple[Any, ...] = field(repr=False)


@dataclass(frozen=True)
class Split:
    """Disjoint parts of one device, out of one driver call: aligned groups, and what is left.

    A remainder promises no co-scheduled SMs: kernels launched in clusters may fail on a small one.
    """

    groups: tuple[SmResource, ...]
    remainder: SmResource | None


@dataclass(frozen=True)
class PartitionOptions:
    """How many streams a partition gets, and of which priority (lower first, 0: default)."""

    num_streams: int = 1
    priority: int = 0

    def __post_init__(self) -> None:
        check_integer("num_streams", self.num_streams, minimum=1)
        check_integer("priority", self.priority)


class GreenDevice:
    """One GPU whose `sm_count` SMs can be split.

    Args:
        ordinal: number of the device, as CUDA and torch count.
        driver: default: a new `Driver()`, which raises GreenContextError if there is none.
    """

    def __init__(self, ordinal: int = 0, driver: Driver | None = None) -> None:
        check_integer("ordinal", ordinal, minimum=0)
        self.ordinal = ordinal
        self.driver = driver = Driver() if driver is None else driver
        self.handle: Any = driver("cuDeviceGet", ordinal)
        self._sms: Any = driver("cuDeviceGetDevResource", self.handle, driver.sm_type)
        self.sm_count = int(self._sms.sm.smCount)

    def granularity(self, *, coscheduled: bool = True) -> Granularity:
        """Minimum and alignment of groups, from the driver and not from a table.

        `coscheduled=False` is for finer sizes, but then clusters of thread blocks may not fit.
        """
        # Fields of CUDA 13; the structs of older bindings lack them, older drivers leave them 0.
        minimum = int(getattr(self._sms.sm, "minSmPartitionSize", 0))
        alignment = int(getattr(self._sms.sm, "smCoscheduledAlignment", 0))
        if coscheduled and minimum and alignment:
            return Granularity(minimum, alignment)
        # Else see what the driver grants to somebody who asks for too little.
        minimum = self._granted(1, coscheduled)
        if minimum == 0:
            raise GreenContextUnavailable(f"device {self.ordinal} cannot be split")
        above = self._granted(minimum + 1, coscheduled) if minimum < self.sm_count else 0
        return Granularity(minimum, above - minimum if above else minimum)

    def split(self, counts: Sequence[int], *, coscheduled: bool = True) -> Split:
        """Splits the device into one group for each of `counts`, and the remainder.

        Args:
            counts: SMs wanted for each group; each is rounded up to the device's granularity.
            coscheduled: see `granularity`.

        Raises:
            ValueError: no counts, one that is no positive integer, or too many SMs in all.
            GreenContextUnavailable: the device has the SMs but cannot arrange them like that.
            DriverError: the driver refused for another reason.
        """
        for count in counts:
            check_integer("counts", count, minimum=1)
        granularity = self.granularity(coscheduled=coscheduled)
        sizes = [granularity.round_up(count, len(counts)) for count in counts]
        total, where = sum(sizes), f"device {self.ordinal} with {self.sm_count} SMs"
        if not 0 < total <= self.sm_count:
            raise ValueError(f"groups of {sizes} SMs, {total} in all, do not fit {where}")
        # NOTE: a group or remainder cannot be split again before a green context was made of it
        # (error 915), but a context may be made of several groups of one split. So unequal groups
        # are put together from equal units, the larger the better, as neighbours stay together.
        for unit in granularity.units(sizes):
            units, rest = self._split_evenly(total // unit, unit, coscheduled)
            if [int(group.sm.smCount) for group in units] == [unit] * (total // unit):
                deal = iter(units)
                groups = [SmResource(n, tuple(islice(deal, n // unit))) for n in sizes]
                left = SmResource(int(rest.sm.smCount), (rest,)) if total < self.sm_count else None
                return Split(tuple(groups), left)
        raise GreenContextUnavailable(f"{where} cannot make groups of {sizes} SMs")

    def _split_evenly(self, groups: int, count: int, coscheduled: bool) -> tuple[list[Any], Any]:
        """Splits off up to `groups` groups of `count` SMs or more. Returns them and the rest."""
        function = "cuDevSmResourceSplitByCount"
        flags = 0 if coscheduled else IGNORE_SM_COSCHEDULING
        try:
            made, number, rest = self.driver(function, groups, self._sms, flags, count)
        except DriverError as error:
            if error.code != INVALID_RESOURCE_CONFIGURATION:
                raise
            return [], self._sms
        return list(made)[: int(number)], rest

    def _granted(self, count: int, coscheduled: bool) -> int:
        """SMs the driver grants when asked for one group of `count`; 0 if it makes none."""
        groups, _ = self._split_evenly(1, count, coscheduled)
        return int(groups[0].sm.smCount) if groups else 0


class Partition(AbstractContextManager["Partition"]):
    """Owner of one green context and the streams on it; the current CUDA context stays as it was.

    Args:
        device: the device that made the split.
        resource: a group or the remainder of `device.split(...)`.
        options: default: one stream of default priority.

    Attributes:
        sm_count: SMs it has, as the driver reports them of the finished green context.
        stream_handles: the driver's handles (CUstream) of its streams.
        closed: whether streams and context are gone.

    Raises:
        DriverError: the driver refused; whatever had been made until then is destroyed again.
    """

    def __init__(
        self, device: GreenDevice, resource: SmResource, options: PartitionOptions | None = None
    ) -> None:
        options = PartitionOptions() if options is None else options
        self.device, driver = device, device.driver
        self._leases: list[Lease] = []
        self._undo = undo = Undo(driver)
        self.closed = False
        try:
            # NOTE: the driver has no call to free a descriptor; it lives as long as the process.
            handles = list(resource.handles)
            descriptor = driver("cuDevResourceGenerateDesc", handles, len(handles))
            context = undo.make(
                "cuGreenCtxCreate",
                descriptor,
                device.handle,
                DEFAULT_STREAM,
                undo=["cuGreenCtxDestroy"],
            )
            granted = driver("cuGreenCtxGetDevResource", context, driver.sm_type)
            self.sm_count = int(granted.sm.smCount)
            streams = (
                _create_stream(undo, driver, context, options.priority)
                for _ in range(options.num_streams)
            )
            self.stream_handles = tuple(map(int, streams))
        except BaseException:
            close_after_error(undo)
            raise

    def torch_stream(self, index: int = 0) -> torch.cuda.ExternalStream:
        """Stream number `index` for torch. It stays this partition's; torch never destroys it."""
        self.check_open()
        import torch

        device = torch.device("cuda", self.device.ordinal)
        return torch.cuda.ExternalStream(self.stream_handles[index], device=device)

    def hold(self, reason: str) -> Lease:
        """Keeps the partition open until the returned lease is released."""
        return Lease([self], reason)

    def check_open(self) -> None:
        """Raises PartitionClosed once the partition is closed."""
        if self.closed:
            raise PartitionClosed(f"this partition of {self.sm_count} SMs is closed")

    def check_idle(self) -> None:
        """Raises PartitionInUse, with the reasons, while leases are held."""
        if self._leases:
            held = ", ".join(lease.reason for lease in self._leases)
            raise PartitionInUse(f"a partition of {self.sm_count} SMs is still held for: {held}")

    def close(self) -> None:
        """Waits for the streams, destroys them, then the green context. May be called twice.

        Raises:
            PartitionInUse: a lease is held; nothing was destroyed.
            DriverError: a call failed; all the others were made all the same.
        """
        self.check_idle()
        self.closed = True
        self._undo.close()

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Lease(AbstractContextManager["Lease"]):
    """Keeps partitions open until `release()`, which may be called twice, or until `with` ends."""

    def __init__(self, partitions: Sequence[Partition], reason: str) -> None:
        for partition in partitions:
            partition.check_open()
        self.reason = reason
        self._partitions = list(partitions)
        for partition in partitions:
            partition._leases.append(self)

    def release(self) -> None:
        """Lets go of the partitions."""
        while self._partitions:
            self._partitions.pop()._leases.remove(self)

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def _create_stream(undo: Undo, driver: Driver, context: Any, priority: int) -> Any:
    """Creates a stream on a green context; leaves the thread's current context as it was."""
    destroy = ["cuStreamSynchronize", "cuStreamDestroy"]
    if driver.has("cuGreenCtxStreamCreate"):
        return undo.make("cuGreenCtxStreamCreate", context, NON_BLOCKING, priority, undo=destroy)
    as_context = driver("cuCtxFromGreenCtx", context)
    undo.make("cuCtxPushCurrent", as_context, undo=["cuCtxPopCurrent"])
    stream = undo.make("cuStreamCreateWithPriority", NON_BLOCKING, priority, undo=destroy)
    # NOTE: after a pop that failed, the thread would go on with a context that is about to be
    # destroyed. So it is tried again when the partition, which fails then, is undone.
    undo.run_early("cuCtxPopCurrent")
    return stream


def main() -> int:
    """Prints what device 0 grants for a few requests. Returns the exit status."""
    try:
        device = GreenDevice(0)
        total = device.sm_count
        print(f"device 0: {total} SMs, driver for CUDA {device.driver.version_text}")
        for coscheduled in (True, False):
            sizes = device.granularity(coscheduled=coscheduled)
            print(f"{coscheduled=}: minimum {sizes.minimum}, alignment {sizes.alignment}")
            for count in (1, 12, 16, 36, total * 3 // 4):
                if sizes.round_up(count) <= total:
                    granted = device.split([count], coscheduled=coscheduled).groups[0].sm_count
                    print(f"{count:>6} asked {granted:>6} granted {total - granted:>6} left")
    except GreenContextError as error:
        print(f"green contexts are not available: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
