"""Disjoint SM partitions of one GPU, one for each lane that has SMs of its own.

    with Partitions(torch.device("cuda:0"), [36, 80, 16]) as partitions:
        attention, mlp, qkv = partitions.streams

Counts are rounded up to what the device makes. At most one lane gets the remainder: attention, if
it can be, for on a small remainder some kernels of cuBLAS fail. Several owners with different
splits may live on one device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from green_ctx import Driver, GreenContextError, GreenContexts, GreenDevice

logger = logging.getLogger(__name__)


class Partitions(GreenContexts):
    """Owner of one SM partition for each lane of a CUDA device; `sms` are those granted.

    Raises:
        ValueError: an argument that cannot be; nothing was created.
        GreenContextError: no driver, no such split, or a refused call; it is logged.
    """

    def __init__(
        self,
        device: torch.device,
        counts: Sequence[int],  # SMs wanted for each lane; fewer than 16 are too few for cuBLAS
        names: Sequence[str] = (),  # what errors call the counts
        driver: Driver | None = None,  # default: the real one
    ) -> None:
        if device.type != "cuda":
            raise ValueError(f"device={str(device)!r} is not allowed: it must be a CUDA device")
        try:
            driver = driver or Driver()
            ordinal = torch.cuda.current_device() if device.index is None else device.index
            gpu = GreenDevice(ordinal, driver)
            super().__init__(gpu, gpu.split(counts, names))
        except GreenContextError as error:
            logger.warning("[GreenContextManager] Failed to initialize Green Context: %s", error)
            raise

    @property
    def streams(self) -> tuple[torch.cuda.ExternalStream, ...]:
        """The stream of each partition, which torch never destroys; RuntimeError after close."""
        if self.closed:
            raise RuntimeError(f"{type(self).__name__} of {self.sms} SMs is closed")
        device = torch.device("cuda", self.device.ordinal)
        return tuple(torch.cuda.ExternalStream(s, device=device) for s in self.stream_handles)


class GreenContextManager(Partitions):
    """`Partitions` for two lanes: attention, and everything dense (the FFN).

    Kept for the specification, tests/seed_spec.py, and handy for the benchmark's curves; the engine
    makes `Partitions` for the lanes of a plan.
    """

    def __init__(
        self,
        device: torch.device,
        attention_sm_count: int,
        ffn_sm_count: int,
        *,
        driver: Driver | None = None,
    ) -> None:
        names = "pipeline_attention_sm_count", "pipeline_ffn_sm_count"
        super().__init__(device, (attention_sm_count, ffn_sm_count), names, driver)
        self.attention_sms, self.ffn_sms = self.sms

    def get_attention_stream(self) -> torch.cuda.ExternalStream:
        """The stream of the attention partition."""
        return self.streams[0]

    def get_ffn_stream(self) -> torch.cuda.ExternalStream:
        """The stream of the FFN partition."""
        return self.streams[1]
