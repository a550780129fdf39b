"""Two disjoint SM partitions of one GPU: one for attention, one for everything dense (the FFN).

    with GreenContextManager(torch.device("cuda:0"), 36, 96) as manager:
        with torch.cuda.stream(manager.get_attention_stream()): ...
        with torch.cuda.stream(manager.get_ffn_stream()): ...

The design in a few lines:
- `plan_partitions` is plain arithmetic: it rounds both requests up to what the device makes, and
  decides which side, if any, gets all that the other's group leaves.
- The FFN side has an aligned group if it can. cuBLAS launches clusters of thread blocks, and on a
  small unaligned remainder (12 SMs of an H200) some of its kernels fail.
- Both partitions come from one driver split, so they share no SM. A manager keeps no state outside
  itself: several with different splits may live on one device, to switch between.

Needs a CUDA GPU and driver 12.4 or newer; `python green_ctx.py` says what the device grants.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from green_ctx import (
    Driver,
    Granularity,
    GreenContextError,
    GreenContextUnavailable,
    GreenDevice,
    Lease,
    Partition,
    PartitionOptions,
    SmResource,
    check_integer,
    close_after_error,
    run_all,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PartitionPlan:
    """What to ask of the driver: SMs of each group; None for all that the other group leaves."""

    attention: int | None
    ffn: int | None


@dataclass(frozen=True)
class GrantedSms:
    """How the SMs of a device were dealt out, as the driver reports it; counts in SMs.

    Attributes:
        attention: in the attention partition.
        ffn: in the FFN partition.
        device: in the whole device.
    """

    attention: int
    ffn: int
    device: int

    @property
    def unused(self) -> int:
        """SMs in neither partition."""
        return self.device - self.attention - self.ffn

    @property
    def disjoint(self) -> bool:
        """Whether both fit beside each other, as two parts of one driver split must."""
        return self.unused >= 0


def plan_partitions(
    total: int, granularity: Granularity, attention_sm_count: int, ffn_sm_count: int
) -> PartitionPlan:
    """Rounds two requests up to what a device of `total` SMs can make.

    Each side gets an aligned group if both fit. If they do not, or if they fill the device, one
    side gets an aligned group and the other the whole remainder, which need not be a multiple of
    the alignment: attention if possible, else the FFN.

    Raises:
        ValueError: a count is no positive integer, or both together exceed the device.
    """
    check_integer("pipeline_attention_sm_count", attention_sm_count, minimum=1)
    check_integer("pipeline_ffn_sm_count", ffn_sm_count, minimum=1)
    attention = granularity.round_up(attention_sm_count, groups=2)
    ffn = granularity.round_up(ffn_sm_count, groups=2)
    attention_alone = granularity.round_up(attention_sm_count)
    ffn_alone = granularity.round_up(ffn_sm_count)
    if attention + ffn <= total and attention_sm_count + ffn_alone != total:
        return PartitionPlan(attention, ffn)
    if attention_sm_count + ffn_alone <= total:
        return PartitionPlan(None, ffn_alone)
    if attention_alone + ffn_sm_count <= total:
        return PartitionPlan(attention_alone, None)
    raise ValueError(
        f"pipeline_attention_sm_count={attention_sm_count} and pipeline_ffn_sm_count="
        f"{ffn_sm_count} are not allowed: with groups of {granularity.alignment} SMs they need "
        f"{min(attention_sm_count + ffn_alone, attention_alone + ffn_sm_count)} SMs, and the "
        f"device has {total}"
    )


class GreenContextManager(AbstractContextManager["GreenContextManager"]):
    """Owner of the attention partition and the FFN partition of one GPU.

    Args:
        device: a CUDA device.
        attention_sm_count: SMs wanted for attention, rounded up as `plan_partitions` says.
        ffn_sm_count: SMs wanted for the dense work. Fewer than 16 are too few for cuBLAS.
        coscheduled: False for partitions in smaller steps (2 instead of 8 SMs on an H200), without
            the promise that clusters of thread blocks fit.
        num_streams: streams on each partition.
        driver: default: the real one.

    Raises:
        ValueError: an argument that cannot be; nothing was created.
        GreenContextUnavailable: no driver, a driver without green contexts, or no such split.
        DriverError: the driver refused a call. This and the former are logged; nothing is leaked.
    """

    def __init__(
        self,
        device: torch.device,
        attention_sm_count: int,
        ffn_sm_count: int,
        *,
        coscheduled: bool = True,
        num_streams: int = 1,
        driver: Driver | None = None,
    ) -> None:
        check_integer("pipeline_attention_sm_count", attention_sm_count, minimum=1)
        check_integer("pipeline_ffn_sm_count", ffn_sm_count, minimum=1)
        options = PartitionOptions(num_streams=num_streams)
        if device.type != "cuda":
            raise ValueError(f"device={str(device)!r} is not allowed: it must be a CUDA device")
        self.device = device
        partitions: list[Partition] = []
        try:
            gpu = GreenDevice(_ordinal(device), driver)
            granularity = gpu.granularity(coscheduled=coscheduled)
            plan = plan_partitions(gpu.sm_count, granularity, attention_sm_count, ffn_sm_count)
            for side in _split(gpu, plan, coscheduled):
                partitions.append(Partition(gpu, side, options))
            self.attention, self.ffn = partitions
            #: What the driver granted, which may be more than was asked for.
            self.granted = GrantedSms(self.attention.sm_count, self.ffn.sm_count, gpu.sm_count)
        except BaseException as error:
            for partition in reversed(partitions):
                close_after_error(partition)
            if isinstance(error, GreenContextError):
                logger.warning(
                    "[GreenContextManager] Failed to initialize Green Context: %s", error
                )
            raise

    @property
    def attention_sms(self) -> int:
        """SMs granted to the attention partition."""
        return self.granted.attention

    @property
    def ffn_sms(self) -> int:
        """SMs granted to the FFN partition."""
        return self.granted.ffn

    @property
    def closed(self) -> bool:
        """Whether both partitions are gone."""
        return self.attention.closed and self.ffn.closed

    def get_attention_stream(self, index: int = 0) -> torch.cuda.ExternalStream:
        """Stream number `index` of the attention partition; PartitionClosed after `close()`."""
        return self.attention.torch_stream(index)

    def get_ffn_stream(self, index: int = 0) -> torch.cuda.ExternalStream:
        """Stream number `index` of the FFN partition; PartitionClosed after `close()`."""
        return self.ffn.torch_stream(index)

    def hold(self, reason: str) -> Lease:
        """Keeps both partitions open until the returned lease is released.

        A CUDA graph captured on these streams must hold one for as long as it may be replayed,
        because its kernels stay bound to the partitions they were captured on.
        """
        return Lease([self.attention, self.ffn], reason)

    def close(self) -> None:
        """Destroys the streams and green contexts. May be called twice.

        Raises:
            PartitionInUse: a lease on either partition is held; nothing was destroyed.
            DriverError: a call failed; all the others were made all the same.
        """
        self.attention.check_idle()
        self.ffn.check_idle()
        run_all([self.ffn.close, self.attention.close])

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _split(
    device: GreenDevice, plan: PartitionPlan, coscheduled: bool
) -> tuple[SmResource, SmResource]:
    """Makes the attention and the FFN side of a plan, both out of one driver split."""
    sizes = [size for size in (plan.ffn, plan.attention) if size is not None]
    split = device.split(sizes, coscheduled=coscheduled)
    parts = [part for part in (*split.groups, split.remainder) if part is not None]
    if len(parts) < 2:
        raise GreenContextUnavailable(f"a group of {sizes[0]} SMs leaves none for the other stage")
    if plan.ffn is None:
        return parts[0], parts[1]
    return parts[1], parts[0]


def _ordinal(device: torch.device) -> int:
    """Number of a CUDA device; torch's current one if `device` names none."""
    if device.index is not None:
        return device.index
    import torch

    if not torch.cuda.is_available():
        raise GreenContextUnavailable("torch sees no CUDA device")
    return torch.cuda.current_device()
