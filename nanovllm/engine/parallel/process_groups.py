"""How ranks meet, and the process groups they form, by torch's public interface.

Processes that rank 0 started meet at a file in a directory that only their user can open, so no
port is open to strangers. Under torchrun they meet where torchrun says.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# A worker waits for the next step as long as the user thinks.
PATIENCE = timedelta(days=365)
# One collective of NCCL; the first waits for the slowest rank to compile its kernels.
NCCL_TIMEOUT = timedelta(minutes=10)


class ProcessGroups:
    """The groups of one engine, on one of its ranks.

    `control` is for steps: gloo, may stay silent for days. `model` is for the model's collectives:
    NCCL on CUDA, else gloo, too.
    """

    def __init__(self, device: torch.device, *, one_machine: bool) -> None:
        """Forms them among the ranks of torch's default group, which all do the same."""
        with environment(**loopback() if one_machine else {}):
            self.control = dist.new_group(backend="gloo", timeout=PATIENCE)
            if device.type == "cuda":
                self.model = dist.new_group(backend="nccl", timeout=NCCL_TIMEOUT)
            else:
                self.model = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.owns_default = False

    @classmethod
    def meet(cls, path: str, rank: int, size: int, device: torch.device) -> ProcessGroups:
        """Forms them with the other ranks of this machine, which meet at a file."""
        arrival(path, rank).touch()
        store = dist.FileStore(path, size)
        with environment(**loopback()):
            dist.init_process_group(
                "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE
            )
        try:
            groups = cls(device, one_machine=True)
        except BaseException:
            dist.destroy_process_group()
            raise
        groups.owns_default = True
        return groups

    @staticmethod
    def workers_are_here(path: str, size: int) -> bool:
        """Whether all ranks but 0 have come to `meet`."""
        return all(arrival(path, rank).exists() for rank in range(1, size))

    @classmethod
    def of_torchrun(cls, device: torch.device) -> ProcessGroups:
        """Meets the ranks that torchrun started.

        NOTE: the default group stays, as torchrun's store can make it but once.
        """
        one_machine = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
        if not dist.is_initialized():
            with environment(**loopback() if one_machine else {}):
                dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(device, one_machine=one_machine)

    def abort(self) -> None:
        """Ends all collectives of the model, finished or not.

        NOTE: once only: two aborts at a time block each other.
        """
        self.model.abort()

    def close(self) -> None:
        """Leaves the groups; may be called twice."""
        if self.owns_default:
            if dist.is_initialized():
                dist.destroy_process_group()  # and all that were formed in it
            return
        for group in (self.model, self.control):
            with suppress(ValueError):  # has been left
                dist.destroy_process_group(group)


def arrival(path: str, rank: int) -> Path:
    """The file that says that a rank has come to the meeting at `path`.

    NOTE: the store itself cannot: whoever is done with it may delete its file.
    """
    return Path(f"{path}-{rank}")


def check_no_default_group() -> None:
    """Raises ValueError if this process has set up torch.distributed."""
    if dist.is_initialized():
        raise ValueError(
            "tensor_parallel_size > 1 is not allowed in a process that has torch.distributed "
            "initialised, be it by another engine with several ranks: destroy_process_group() "
            "first, or start all ranks with torchrun"
        )


def loopback() -> dict[str, str]:
    """Environment in which gloo listens on the loopback interface alone."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    return {"GLOO_SOCKET_IFNAME": names[0]} if names else {}


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Sets environment variables that the user has not set."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]
