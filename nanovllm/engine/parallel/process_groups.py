"""Connections between ranks: a store where they meet, and the process groups they form there.

The groups are made directly, not by `torch.distributed.init_process_group`: they leave torch's one
default group, and with it the user's own torch.distributed, alone.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

LOOPBACK = "127.0.0.1"
# `gloo_group` carries steps: a worker waits for the next as long as the user thinks.
GLOO_TIMEOUT = timedelta(days=365)
# One collective of the model; the first waits for the slowest rank to compile its kernels.
NCCL_TIMEOUT = timedelta(minutes=10)


def serve_store(timeout: timedelta) -> tuple[dist.TCPStore, int]:
    """A store on a free port of the loopback interface, and the port."""
    # NOTE: left to open the port itself, torch would listen on every interface.
    server = socket.create_server((LOOPBACK, 0))
    port = server.getsockname()[1]
    store = dist.TCPStore(
        LOOPBACK,
        port,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )
    return store, port


def visit_store(port: int, timeout: timedelta) -> dist.TCPStore:
    """The store that another process of this machine serves."""
    return dist.TCPStore(LOOPBACK, port, is_master=False, timeout=timeout)


def gloo_group(store: dist.Store, rank: int, size: int, one_machine: bool) -> dist.ProcessGroup:
    """A group for CPU tensors; on one machine it needs no network but the loopback interface."""
    if one_machine:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        options._timeout = GLOO_TIMEOUT
        backend = dist.ProcessGroupGloo(store, rank, size, options)
    else:
        backend = dist.ProcessGroupGloo(store, rank, size, GLOO_TIMEOUT)
    group = dist.ProcessGroup(store, rank, size)
    return _with_backend(group, "cpu", dist.ProcessGroup.BackendType.GLOO, backend)


def nccl_group(store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
    """A group for tensors on this thread's current CUDA device.

    NOTE: it is made at once, but connects in its first collective.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = NCCL_TIMEOUT
    backend = dist.ProcessGroupNCCL(store, rank, size, options)
    group = dist.ProcessGroup(store, rank, size)
    return _with_backend(group, "cuda", dist.ProcessGroup.BackendType.NCCL, backend)


def abort_nccl(group: dist.ProcessGroup) -> None:
    """Ends all collectives of an NCCL group, finished or not, and the group with them.

    NOTE: once only: two aborts at a time block each other.
    """
    group._get_backend(torch.device("cuda")).abort()


@contextmanager
def surviving_nccl_errors() -> Iterator[None]:
    """NCCL groups made within do not end the whole process when a rank is lost."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def _with_backend(
    group: dist.ProcessGroup,
    device_type: str,
    kind: dist.ProcessGroup.BackendType,
    backend: Any,
) -> dist.ProcessGroup:
    group._set_default_backend(kind)
    group._register_backend(torch.device(device_type), kind, backend)
    return group
