"""Memory that all ranks of one host can read and write, and the collectives that use it.

The kernels are ours (`kernels.all_reduce`): their sums are float32 in rank order, an all-reduce
carries residual and norm, and their waits are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from green_ctx import Driver
from nanovllm.kernels.gpu import usable_sms
from nanovllm.layers.shared_slab import SharedSlab

# Rows of an all-reduce; more go through NCCL.
MOST_ROWS = 2048
# Rows that are pushed.
PUSHED_ROWS = 16
# Bytes of a partial sum up to which every rank adds all rows; of two, neither way saves any.
ONE_SHOT_BYTES = {2: 16 << 20, 3: 1 << 20, 4: 512 << 10}
# More move bytes no faster, and every program of a two-shot meets its peers twice.
TWO_SHOT_PROGRAMS = 64
# All-reduces of a layer, and the embedding's: neighbours never share a buffer.
TURNS = 3
# Most 8-byte values a rank gives to a gather.
MOST_VALUES = 1 << 17
# Looks at a counter take at least so long; an H100's 0.35 us.
POLL_SECONDS = 0.3e-6
# Of each buffer, in bytes.
ALIGNMENT = 256


@dataclass(frozen=True)
class Shared:
    """A tensor of this rank that the others can access, and where each rank's is."""

    own: Tensor
    addresses: tuple[int, ...]


class PeerMemory:
    """The shared buffers of one rank.

    Args:
        group: of the ranks, one a GPU of this host; for tensors of the CPU.
        device: this rank's.
        dtype: of hidden states.
        hidden: their width.
        timeout: seconds that a kernel waits for a peer.

    Raises:
        GreenContextError: of the driver: a rank's memory cannot be had or not be reached.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        hidden: int,
        timeout: float,
    ) -> None:
        # Loaded on CUDA only: they need Triton.
        from nanovllm.kernels import all_reduce

        self.kernels = all_reduce
        self.group, self.device = group, device
        self.rank, self.size = group.rank(), group.size()
        sms = torch.cuda.get_device_properties(device).multi_processor_count
        programs = sms * all_reduce.programs_per_sm(hidden)
        rows = [((MOST_ROWS, hidden), dtype)] * (2 * TURNS)
        pushed = [((self.size, PUSHED_ROWS, hidden), torch.int64)] * TURNS
        inboxes = [((self.size, MOST_VALUES), torch.int64)] * 2
        scattered = (self.size, -(-MOST_ROWS // self.size), hidden), dtype
        counters, self.scattered, *buffers = self._share(
            [((2, programs, self.size), torch.int32), scattered, *rows, *pushed, *inboxes]
        )
        self.parts, self.results = buffers[:TURNS], buffers[TURNS : 2 * TURNS]
        self.pushed, self.inboxes = buffers[2 * TURNS : 3 * TURNS], buffers[3 * TURNS :]
        self.peers = all_reduce.Peers(
            self.rank,
            self.size,
            counters.addresses,
            torch.zeros(programs, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            programs,
            int(timeout / POLL_SECONDS),
        )
        self.gathers = 0
        # NOTE: of another priority, so that it shares no queue with what waits for the very kernel
        # that is to end; and for copies, as a kernel could find no place on an SM beside that one.
        self._side_stream = torch.cuda.Stream(device, priority=-1)
        self._one = torch.ones(1, dtype=torch.int32, device="cpu").pin_memory()

    def part(self, turn: int, first: int, rows: int) -> Tensor | None:
        """Where to write a partial sum of so many rows; None: there is no room for it.

        Args:
            turn: which all-reduce of the layer.
            first: the first row's place among those of the step.
            rows: how many.
        """
        if first + rows > MOST_ROWS:
            return None
        return self.parts[turn].own[first : first + rows]

    def add_norm(
        self, part: Tensor, turn: int, first: int, residual: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        """The norm of all ranks' partial sums and the residual, which is updated.

        NOTE: the residual is right only in the rows that this rank's next call reads.

        Args:
            part: this rank's, from `part`.
            turn, first: as there.
            residual: [T, hidden].
            weight, eps: of the norm.
        """
        rows, hidden = residual.shape
        result = self.results[turn]
        output = result.own[first : first + rows]
        if first + rows <= PUSHED_ROWS and hidden % 2 == 0:
            self.kernels.push_add_norm(
                self.peers, part, self.pushed[turn].addresses, PUSHED_ROWS, output, first,
                residual, weight, eps,
            )  # fmt: skip
            return output
        two_shot = rows * hidden * part.element_size() > ONE_SHOT_BYTES.get(self.size, 0)
        sms, per_sm = usable_sms(self.device), self.kernels.programs_per_sm(hidden)
        if two_shot:
            programs = min(-(-rows // self.size), sms * per_sm, TWO_SHOT_PROGRAMS)
        else:  # only reads, for which half of what fits an SM is faster
            programs = min(rows, sms * -(-per_sm // 2))
        self.kernels.all_reduce_add_norm(
            self.peers,
            self.parts[turn].addresses,
            self.scattered.addresses,
            result.addresses,
            first,
            (rows, hidden),
            residual,
            weight,
            eps,
            programs,
            two_shot,
        )
        return output

    def gather(self, x: Tensor) -> Tensor | None:
        """Every rank's `x`, [size, *x.shape]; valid until the next gather.

        None: there is no room for it.
        """
        values = x.contiguous().view(-1).view(torch.int64)
        if values.numel() > MOST_VALUES:
            return None
        inbox = self.inboxes[self.gathers % 2]
        self.gathers += 1
        self.kernels.gather(self.peers, values, inbox.addresses)
        taken = inbox.own.view(-1)[: self.size * values.numel()]
        return taken.view(x.dtype).view(self.size, *x.shape)

    def expire(self) -> None:
        """Lets a kernel that waits for a peer end; nothing after that is valid."""
        with torch.cuda.stream(self._side_stream), torch.inference_mode():
            self.peers.expired.copy_(self._one, non_blocking=True)

    def disconnect(self) -> None:
        """Gives up the memory of the others; may be called twice."""
        self._slab.disconnect()

    def close(self) -> None:
        """Frees this rank's memory, once all have disconnected; may be called twice."""
        self._slab.close()

    def _share(self, wanted: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Shared]:
        """Shared tensors of these shapes and types, zero at first."""
        places, size = [], 0
        for shape, dtype in wanted:
            places.append((size, size + math.prod(shape) * dtype.itemsize))
            size = -(-places[-1][1] // ALIGNMENT) * ALIGNMENT
        self._slab = slab = SharedSlab(Driver(), self.group, self.device, size)
        return [
            Shared(
                slab.own[start:end].view(dtype).view(shape),
                tuple(base + start for base in slab.bases),
            )
            for (shape, dtype), (start, end) in zip(wanted, places, strict=True)
        ]
