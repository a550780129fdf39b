"""One piece of device memory of each rank of a host, which all of them can read and write.

By CUDA's handles for other processes (https://docs.nvidia.com/cuda/cuda-driver-api, cuIpc*).
torch's symmetric memory would do it, too, but numbers its exchanges by process: a rank 0 that
starts its second engine, with new workers, would wait for them forever.
"""

from __future__ import annotations

import ctypes

import torch
import torch.distributed as dist

from green_ctx import Driver, DriverError
from nanovllm.utils.waiting import complete

HANDLE_BYTES = 64
# The ranks meet when the slowest has its memory.
MEETING_SECONDS = 300.0
ENABLE_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class SharedSlab:
    """Memory of this rank and, by address, that of the others.

    Attributes:
        own: uint8 [size], this rank's, zero at first.
        bases: where each rank's begins, as this rank's device sees it.

    NOTE: a rank frees its own memory only when no other has it open any more: all `disconnect`,
    meet, and `close`.
    """

    def __init__(
        self, driver: Driver, group: dist.ProcessGroup, device: torch.device, size: int
    ) -> None:
        """A collective: every rank makes one of the same `size`, in bytes.

        Args:
            driver: calls into CUDA.
            group: of the ranks, one a GPU; its collectives take tensors of the CPU.
            device: this rank's, the current one.

        Raises:
            DriverError: there is not enough memory, or another rank's cannot be opened.
            TimeoutError: a rank does not come.
        """
        self._driver, self._device = driver, device
        self._address, self._opened = 0, list[int]()
        failure = None
        handle = bytes(HANDLE_BYTES)  # which nobody can open
        try:
            torch.cuda.synchronize(device)  # makes its context the current one
            self._address = int(driver("cuMemAlloc", size))
            driver("cuMemsetD8", self._address, 0, size)
            torch.cuda.synchronize(device)
            own = driver("cuIpcGetMemHandle", self._address)
            handle = ctypes.string_at(int(own.getPtr()), HANDLE_BYTES)
        except DriverError as error:
            failure = error
        try:
            handles = self._exchange(group, handle)  # in any case: the others wait for it
            if failure is not None:
                raise failure
            self.bases = [
                self._address if rank == group.rank() else self._open(handle)
                for rank, handle in enumerate(handles)
            ]
        except BaseException:
            self.close()
            raise
        self.own = torch.as_tensor(_Bytes(self._address, size), device=device)

    def _exchange(self, group: dist.ProcessGroup, handle: bytes) -> list[bytes]:
        own = torch.frombuffer(bytearray(handle), dtype=torch.uint8)
        handles = [torch.empty_like(own) for _ in range(group.size())]
        complete(dist.all_gather(handles, own, group=group, async_op=True), MEETING_SECONDS)
        return [bytes(handle.tolist()) for handle in handles]

    def _open(self, handle: bytes) -> int:
        from cuda.bindings import driver as bindings

        theirs = bindings.CUipcMemHandle()
        ctypes.memmove(int(theirs.getPtr()), handle, HANDLE_BYTES)
        address = int(self._driver("cuIpcOpenMemHandle", theirs, ENABLE_PEER_ACCESS))
        self._opened.append(address)
        return address

    def disconnect(self) -> None:
        """Gives up the memory of the others, once no kernel uses it; may be called twice."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            while self._opened:
                self._driver("cuIpcCloseMemHandle", self._opened.pop())

    def close(self) -> None:
        """Frees this rank's memory, too; may be called twice."""
        try:
            self.disconnect()
        finally:
            address, self._address = self._address, 0
            if address:
                with torch.cuda.device(self._device):
                    self._driver("cuMemFree", address)


class _Bytes:
    """Device memory as torch takes it over."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3,
        }  # fmt: skip
