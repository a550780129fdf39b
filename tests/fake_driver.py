"""A stand-in for `cuda.bindings.driver` that deals out numbered SMs.

It keeps the real one's rules: groups are rounded up, only the device's own resource can be split, a
context may join parts of one split only, and a stream belongs to a partition if it was created on
it.
"""

import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import green_ctx
from green_ctx import Driver, GreenDevice
from nanovllm.config import Config
from nanovllm.engine.green_manager import GreenContextManager, Partitions
from nanovllm.engine.pipeline_modes import Pipelines, build_pipelines
from nanovllm.engine.plan import Plan

ROOT = Path(green_ctx.__file__).resolve().parent
CUDA0 = torch.device("cuda:0")


class Result(IntEnum):
    """The few of the driver's status codes that these tests need."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_RESOURCE_TYPE = 914
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915


OK = Result.CUDA_SUCCESS
BAD_CONFIGURATION = Result.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION


class FakeDriver:
    """Stands for `cuda.bindings.driver`.

    Args:
        sms: SMs of the device; they are numbered from 0.
        granularity: minimum and alignment of groups.
        version: CUDA version of the driver.
        unbound: functions that the bindings lack.
        most_groups: how many groups of a size the device can arrange; default: as many as fit.
        errors: function -> statuses of its calls in turn, then success.
        fail_at: number of the one call, of all together and from 1, that fails.
        failure: how it fails: with this status, or by raising this.

    A handle whose destruction failed is in `lost`; `misuse` says what no driver would forgive.
    """

    def __init__(
        self,
        sms: int = 132,
        granularity: tuple[int, int] = (8, 8),
        *,
        version: int = 13000,
        unbound: tuple[str, ...] = (),
        most_groups: Callable[[int], int] = lambda size: sys.maxsize,
        errors: dict[str, list[Result]] | None = None,
        fail_at: int = 0,
        failure: int | BaseException = 0,
    ) -> None:
        self.sms, self.granularity = frozenset(range(sms)), granularity
        self.version, self.unbound, self.most_groups = version, unbound, most_groups
        self.errors = errors or {}
        self.fail_at, self.failure = fail_at, failure
        self.lost: list[int] = []
        self.misuse: list[str] = []
        self.calls: list[str] = []
        self.contexts: dict[int, frozenset[int]] = {}  # live green contexts and their SMs
        self.streams: dict[int, int] = {}  # live streams and their green contexts
        self.current: list[int] = [-1]  # stack of current contexts; -1 is the primary one
        self._handles = count(1000)
        self.CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM="SM")

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        """The driver's function `name`: logs the call, and fails as `errors` says."""
        if not name.startswith("cu") or name in self.unbound:
            raise AttributeError(name)

        def call(*args: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            status = self.errors[name].pop(0) if self.errors.get(name) else OK
            if len(self.calls) == self.fail_at:
                status = self.failure
            if status is not OK:
                return self._fail(name, args, status)
            try:
                return getattr(self, f"_{name}")(*args)
            except (AssertionError, KeyError) as error:
                self.misuse.append(f"{name}{args}: {error!r}")
                raise

        return call

    def _fail(self, name: str, args: tuple[Any, ...], status: Any) -> tuple[Any, ...]:
        if name.endswith("Destroy"):
            handle = args[0]
            del (self.contexts if handle in self.contexts else self.streams)[handle]
            self.lost.append(handle)
        if isinstance(status, BaseException):
            raise status
        return status, None

    def sms_of(self, stream: int) -> frozenset[int]:
        """The SMs that kernels on a live stream may run on."""
        return self.contexts[self.streams[stream]]

    def _resource(self, sms: frozenset[int], split: object) -> SimpleNamespace:
        return SimpleNamespace(sm=SimpleNamespace(smCount=len(sms)), sms=sms, split=split)

    def _cuInit(self, flags: int) -> tuple[Any, ...]:
        return (OK,)

    def _cuDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, self.version

    def _cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return OK, ordinal

    def _cuDeviceGetDevResource(self, device: int, kind: str) -> tuple[Any, ...]:
        assert kind == "SM"
        return OK, self._resource(self.sms, None)

    def _cuDevSmResourceSplitByCount(
        self, groups: int, resource: Any, flags: int, at_least: int
    ) -> tuple[Any, ...]:
        if resource.split is not None:
            return BAD_CONFIGURATION, None, None, None
        if not 0 < at_least <= len(resource.sms):
            return Result.CUDA_ERROR_INVALID_VALUE, None, None, None
        assert flags == 0
        minimum, alignment = self.granularity
        size = max(minimum, -(-at_least // alignment) * alignment)
        made = min(groups, len(resource.sms) // size, self.most_groups(size))
        if made == 0:
            return BAD_CONFIGURATION, None, None, None
        sms, split = sorted(resource.sms), object()
        parts = [frozenset(sms[n * size : (n + 1) * size]) for n in range(made)]
        rest = frozenset(sms[made * size :])
        return OK, [self._resource(p, split) for p in parts], made, self._resource(rest, split)

    def _cuDevResourceGenerateDesc(self, resources: list[Any], number: int) -> tuple[Any, ...]:
        assert len(resources) == number
        if len({id(resource.split) for resource in resources}) != 1:
            return BAD_CONFIGURATION, None
        return OK, frozenset().union(*(resource.sms for resource in resources))

    def _cuGreenCtxCreate(self, desc: frozenset[int], device: int, flags: int) -> tuple[Any, ...]:
        assert flags == green_ctx.DEFAULT_STREAM
        context = next(self._handles)
        self.contexts[context] = desc
        return OK, context

    def _cuGreenCtxDestroy(self, context: int) -> tuple[Any, ...]:
        assert context not in self.streams.values(), "streams go first"
        del self.contexts[context]
        return (OK,)

    def _cuGreenCtxGetDevResource(self, context: int, kind: str) -> tuple[Any, ...]:
        return OK, self._resource(self.contexts[context], object())

    def _cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> tuple[Any, ...]:
        assert (flags, priority) == (green_ctx.NON_BLOCKING, 0)
        stream = next(self._handles)
        self.streams[stream] = context
        return OK, stream

    def _cuCtxFromGreenCtx(self, context: int) -> tuple[Any, ...]:
        return OK, context

    def _cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:
        self.current.append(context)
        return (OK,)

    def _cuCtxPopCurrent(self) -> tuple[Any, ...]:
        assert len(self.current) > 1, "nothing was pushed"
        return OK, self.current.pop()

    def _cuStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[Any, ...]:
        return self._cuGreenCtxStreamCreate(self.current[-1], flags, priority)

    def _cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        assert stream in self.streams
        return (OK,)

    def _cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.streams[stream]
        return (OK,)


def install(monkeypatch: pytest.MonkeyPatch, fake: Any) -> None:
    """The bindings that are imported; None: there are none. torch's streams are their handles."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", fake)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: handle)


def device_with(fake: FakeDriver) -> GreenDevice:
    return GreenDevice(0, Driver(fake))


def manager_with(fake: FakeDriver, attention: int, ffn: int) -> GreenContextManager:
    return GreenContextManager(CUDA0, attention, ffn, driver=Driver(fake))


def partitions_with(fake: FakeDriver, *counts: int) -> Partitions:
    return Partitions(CUDA0, counts, driver=Driver(fake))


def build(
    device: str = "cuda:0", plan: Plan | None = None, more: Sequence[Plan] = (), **options: Any
) -> Pipelines:
    """What an engine on `device` would build; no model is needed for that."""
    config = Config(**({"enable_pipeline": True} | options))
    backend = SimpleNamespace(make_workspace=lambda device, num_sms: f"for {num_sms} SMs")
    model: Any = SimpleNamespace(backend=backend)
    return build_pipelines(config, model, torch.device(device), 132, plan, more)
