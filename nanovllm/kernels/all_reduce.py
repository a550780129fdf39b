"""All-reduce with residual and RMS norm in one kernel, over memory that peers can read and write.

Every rank holds a partial sum ``[T, H]`` of a row-parallel layer. What the next layer needs is the
norm of their sum and the residual; an all-reduce that stops at the sum would write and read all
rows once more. So one kernel takes the partial sums of all ranks, adds them in float32 and in rank
order (the bits depend neither on timing nor on the number of programs), adds the residual and
normalises.

- *Pushed*: every rank does this for all rows, and there is no barrier. Each writes its elements to
  its peers, every 4 bytes of them with the number of the launch, and waits for theirs, as NCCL's
  protocol LL does (https://docs.nvidia.com/deeplearning/nccl). That is one trip over the link
  instead of a barrier and then a read, for twice the bytes. Best for a handful of rows.
- *One-shot*: every rank does this for all rows. Each reads ``(N - 1) T H`` elements from its peers,
  and there is one barrier. Best for few rows.
- *Two-shot*: rank ``r`` does it for rows ``r, r + N, ...``, which the others write to its memory,
  and writes the normalised rows to theirs. Each writes ``(N - 1) / N T H`` elements twice, and
  there is a barrier behind either: writes need not wait for the link as reads do. **The residual
  stays where it is made**: a rank's residual is right in its own rows only. That is enough, as only
  this kernel reads it, and always for the same rows.

Each program counts its launches, the same on all ranks, and nothing is reset, so a captured graph
can be replayed. A barrier is one number per (program, rank, first or second) in each rank's
memory: the last launch to arrive there. A program waits for the same program of its peers and for
nothing else. A wait is bounded: after ``max_polls`` looks a program notes that in ``expired`` and
goes on; whoever else writes there ends it, too. No later launch waits again, and the peers are told
with their next signal.

NOTE: launch no more programs than run at a time: a waiting one must not block the one it awaits.
NOTE: no barrier protects a partial sum, or what was pushed, from being overwritten while a peer
reads it. Neighbouring launches use different buffers: who writes the first again has passed the
beginning of the launch on the second, and so has seen that all peers ended the launch on the first.
NOTE: all launches on one `Peers` have one order, the same on all ranks, and do not overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.pdl import pdl_options, pdl_trigger, pdl_wait

GATHER_BLOCK = 1024
ELEMENTS = 8  # of a row a thread holds; words of a row that is pushed
# Of an SM, which has registers for so many threads with REGISTERS each.
MOST_THREADS = 1024
REGISTERS = 64
# Added to a counter by a rank that gave up waiting.
POISON = tl.constexpr(1 << 30)


@dataclass(frozen=True)
class Peers:
    """What one rank knows of the memory of all, its own included.

    Attributes:
        rank, size: of this rank, and how many there are.
        counters: addresses of each rank's int32 ``[2, max_programs, size]``, zero at first.
        launches: int32 ``[max_programs]`` of this rank alone, zero at first: launches that a
            program, or a row that is pushed, has seen.
        expired: int32 ``[1]`` of this rank alone: not 0 once a wait took too long.
        max_programs: the most programs of a launch.
        max_polls: looks at a counter before a wait is given up, 0.35 us each on an H100.
    """

    rank: int
    size: int
    counters: tuple[int, ...]
    launches: Tensor
    expired: Tensor
    max_programs: int
    max_polls: int


def programs_per_sm(hidden: int) -> int:
    """How many programs of `all_reduce_add_norm` an SM runs at a time; ``hidden``: of a row."""
    return MOST_THREADS // (32 * _num_warps(hidden))


def _num_warps(elements: int) -> int:
    return min(max(triton.next_power_of_2(elements) // ELEMENTS, 32), MOST_THREADS) // 32


def all_reduce_add_norm(
    peers: Peers,
    parts: tuple[int, ...],
    inboxes: tuple[int, ...],
    outputs: tuple[int, ...],
    first: int,
    shape: tuple[int, int],
    residual: Tensor,
    weight: Tensor,
    eps: float,
    programs: int,
    two_shot: bool,
) -> None:
    """Write the norm of all partial sums and the residual to ``outputs``; update ``residual``.

    Args:
        peers: the ranks.
        parts: addresses of each rank's partial sums ``[.., H]``, of ``residual``'s dtype and
            aligned to 16 bytes. Two-shot reads this rank's alone.
        inboxes: likewise of ``[size, ceil(T / size), H]``, for the rows that two-shot writes to
            their rank. Launches may all use the same: who gets to the next one has passed the
            barrier at the end of this.
        outputs: likewise of each rank's results ``[.., H]``. One-shot writes to this rank's alone.
        first: row of ``parts`` and ``outputs`` at which the T rows begin.
        shape: ``(T, H)``.
        residual: ``[T, H]``, updated in place: in all rows (one-shot), or in this rank's rows
            (two-shot).
        weight, eps: of the norm.
        programs: how many to launch, at most ``peers.max_programs``, and `programs_per_sm` for
            each SM that they get; the same on all ranks.
        two_shot: see the module; the same on all ranks, and for a step's launches on the same rows.
    """
    rows, hidden = shape
    _all_reduce_kernel[(programs,)](
        parts, inboxes, outputs, residual, weight, peers.counters, peers.launches, peers.expired,
        first, rows, eps, peers.max_polls,
        HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), RANK=peers.rank, SIZE=peers.size,
        MAX_PROGRAMS=peers.max_programs, TWO_SHOT=two_shot,
        num_warps=_num_warps(hidden), maxnreg=REGISTERS, **pdl_options(),
    )  # fmt: skip


def push_add_norm(
    peers: Peers,
    part: Tensor,
    inboxes: tuple[int, ...],
    capacity: int,
    output: Tensor,
    first: int,
    residual: Tensor,
    weight: Tensor,
    eps: float,
) -> None:
    """As one-shot ``all_reduce_add_norm``, but pushed, with a program for each row.

    Args:
        peers: the ranks.
        part: ``[T, H]``, this rank's partial sums.
        inboxes: addresses of each rank's int64 ``[size, capacity, H]``, zero at first, of which
            half is used with 16 bits an element: H must be even then. NOTE: see the module for who
            may write there again.
        output: ``[T, H]``.
        first: place of the T rows in an inbox; all places are below ``peers.max_programs``.
        residual, weight, eps: as there. NOTE: `part`, `output` and `weight` have its dtype.
    """
    rows, hidden = residual.shape
    words = hidden * residual.element_size() // 4
    warps = min(_num_warps(words), 16)
    _push_kernel[(rows,)](
        part, inboxes, output, residual, weight, peers.launches, peers.expired,
        first, eps, peers.max_polls,
        HIDDEN=hidden, WORDS=words, BLOCK=triton.next_power_of_2(words), RANK=peers.rank,
        SIZE=peers.size, CAPACITY=capacity, THREADS=32 * warps, num_warps=warps, **pdl_options(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "polls"])
def _push_kernel(
    part, inboxes, output, residual, weight, launches, expired, first_row, eps, polls,
    HIDDEN: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr,
    SIZE: tl.constexpr, CAPACITY: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Rows are WORDS integers of 32 bits, each of one column or, of 16 bits, of two.
    dtype = residual.dtype.element_ty
    row = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    inside = place < WORDS
    scale1, scale2 = _columns(_load32(weight, place, inside), dtype)
    pdl_wait(PDL)
    pdl_trigger(PDL)
    # NOTE: a slot has a counter of its own, so that the numbers written there only grow.
    counter = launches + first_row + row
    launch = tl.load(counter) + 1
    given_up = tl.load(expired)
    at = row * WORDS + place
    own = _load32(part, at, inside)
    added1, added2 = _columns(_load32(residual, at, inside), dtype)
    number = tl.where(given_up == 0, launch, launch + POISON).to(tl.int64)
    word = (own.to(tl.int64) << 32) | (number & 0xFFFFFFFF)
    line = (first_row + row) * WORDS + place
    for shift in tl.static_range(1, SIZE):
        theirs = _pointer(inboxes[(RANK + shift) % SIZE], tl.int64) + RANK * CAPACITY * WORDS
        tl.store(theirs + line, word, mask=inside, cache_modifier=".wt")
    ours = _pointer(inboxes[RANK], tl.int64)
    total1 = tl.zeros([BLOCK], tl.float32)
    total2 = tl.zeros([BLOCK], tl.float32)
    void = inside.to(tl.int32)
    behind = polls > 0
    while behind & (polls > 0):
        # All peers at one look.
        total1 = tl.zeros([BLOCK], tl.float32)
        total2 = tl.zeros([BLOCK], tl.float32)
        void = tl.zeros([BLOCK], tl.int32)
        missing = tl.zeros([BLOCK], tl.int32)
        for rank in tl.static_range(SIZE):
            bits = own
            if rank != RANK:
                inbox = ours + rank * CAPACITY * WORDS
                pushed = tl.load(inbox + line, mask=inside, other=0, volatile=True)
                seen = pushed.to(tl.int32)
                other = inside & (seen != launch)
                void |= other.to(tl.int32)
                missing |= (other & (seen != launch + POISON)).to(tl.int32)
                bits = (pushed >> 32).to(tl.int32)
            column1, column2 = _columns(bits, dtype)
            total1 += column1
            total2 += column2
        # NOTE: each thread may see another value. A maximum is the same for all, as what ends the
        # loop must be.
        told = tl.load(expired + 0 * tl.arange(0, THREADS), volatile=True)
        behind = (tl.max(missing, axis=0) > 0) & (tl.max(told, axis=0) == 0)
        polls -= 1
    if tl.max(void, axis=0) > 0:
        tl.store(expired, 1)
    tl.debug_barrier()  # all threads have read it
    tl.store(counter, launch)
    rounded = _bits(total1 + added1, total2 + added2, dtype)
    _store32(residual, at, rounded, inside)
    value1, value2 = _columns(rounded, dtype)
    squares = tl.sum(value1 * value1 + value2 * value2, axis=0)
    inverse = tl.rsqrt(squares / HIDDEN + eps)
    normed = _bits(value1 * inverse * scale1, value2 * inverse * scale2, dtype)
    _store32(output, at, normed, inside)


@triton.jit
def _load32(source, place, inside):
    return tl.load(source.to(tl.pointer_type(tl.int32)) + place, mask=inside, other=0)


@triton.jit
def _store32(target, place, bits, inside):
    tl.store(target.to(tl.pointer_type(tl.int32)) + place, bits, mask=inside)


@triton.jit
def _columns(bits, dtype: tl.constexpr):
    """The float32 values of one or two columns in 32 bits; zeros for the second if it is one."""
    # NOTE: Triton 3.6 also compiles what comes after a return in such an if, so `else` it is.
    if dtype.primitive_bitwidth == 32:
        first, second = bits.to(dtype, bitcast=True), tl.zeros_like(bits).to(tl.float32)
    else:
        first = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        second = (bits >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return first, second


@triton.jit
def _bits(first, second, dtype: tl.constexpr):
    """The inverse of `_columns`, rounded."""
    if dtype.primitive_bitwidth == 32:
        bits = first.to(tl.int32, bitcast=True)
    else:
        low = first.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        bits = low | (second.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) << 16)
    return bits


@triton.jit
def _meet(counters, at, launch, expired, polls, RANK: tl.constexpr, SIZE: tl.constexpr):
    """Tells the same program of all peers that this one is here, and waits until they are.

    One that gave up waiting, or was told that a peer did, says so with POISON.
    """
    peer = tl.arange(0, triton.next_power_of_2(SIZE))
    others = (peer < SIZE) & (peer != RANK)
    given_up = tl.load(expired)
    tl.debug_barrier()
    address = tl.zeros([triton.next_power_of_2(SIZE)], tl.int64)
    for rank in tl.static_range(SIZE):
        address = tl.where(peer == rank, counters[rank], address)
    theirs = address.to(tl.pointer_type(tl.int32))
    word = tl.where(given_up == 0, launch, launch + POISON)
    tl.atomic_xchg(theirs + at * SIZE + RANK, word, mask=others, sem="release", scope="sys")
    ours = counters[RANK].to(tl.pointer_type(tl.int32)) + at * SIZE + peer
    # NOTE: this rank's own place is `expired`, looked at by the same instruction: its result is the
    # same for all warps, and that of a load, which may be another for each, must not end the loop.
    watched = tl.where(peer == RANK, expired + 0 * peer, ours)
    seen = tl.atomic_add(watched, 0, mask=peer < SIZE, sem="acquire", scope="sys")
    # The difference, because counters wrap around.
    behind = tl.min(tl.where(others, seen - launch, 0), axis=0) < 0
    told = tl.max(tl.where(peer == RANK, seen, 0), axis=0) != 0
    left = polls
    while behind & (left > 0) & (not told):
        seen = tl.atomic_add(watched, 0, mask=peer < SIZE, sem="acquire", scope="sys")
        behind = tl.min(tl.where(others, seen - launch, 0), axis=0) < 0
        told = tl.max(tl.where(peer == RANK, seen, 0), axis=0) != 0
        left -= 1
    poisoned = tl.max(tl.where(others, seen - launch, 0), axis=0) >= POISON
    if behind | poisoned:
        tl.store(expired, 1)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["first_row", "rows", "polls"])
def _all_reduce_kernel(
    parts, inboxes, outputs, residual, weight, counters, launches, expired,
    first_row, rows, eps, polls,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr, TWO_SHOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    dtype = residual.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    pdl_wait(PDL)
    pdl_trigger(PDL)  # most of the time is waiting
    launch = tl.load(launches + program) + 1
    share: tl.constexpr = SIZE if TWO_SHOT else 1
    capacity = tl.cdiv(rows, SIZE)
    if TWO_SHOT:  # every row to the rank that adds it
        for begin in range(program * SIZE, rows, programs * SIZE):
            for shift in tl.static_range(1, SIZE):
                row = begin + (RANK + shift) % SIZE
                if row < rows:
                    part = _pointer(parts[RANK], dtype) + (first_row + row) * HIDDEN + column
                    theirs = _pointer(inboxes[(RANK + shift) % SIZE], dtype)
                    slot = (RANK * capacity + begin // SIZE) * HIDDEN + column
                    tl.store(theirs + slot, tl.load(part, mask=inside), mask=inside)
    _meet(counters, program, launch, expired, polls, RANK, SIZE)
    tl.store(launches + program, launch)  # all threads have read it

    first = program * share + (RANK if TWO_SHOT else 0)
    for row in range(first, rows, programs * share):
        at = row * HIDDEN + column
        shared = at + first_row * HIDDEN
        total = tl.zeros([BLOCK], tl.float32)
        for rank in tl.static_range(SIZE):
            if TWO_SHOT and rank != RANK:
                slot = (rank * capacity + row // SIZE) * HIDDEN + column
                part = _pointer(inboxes[RANK], dtype) + slot
            else:
                part = _pointer(parts[rank], dtype) + shared
            # NOTE: not cached: a line of a peer's memory in L1 would be of the launch before.
            total += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(dtype)
        tl.store(residual + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(values * values, axis=0) / HIDDEN + eps)
        normed = (values * inverse * scale).to(dtype)
        if TWO_SHOT:
            for shift in tl.static_range(SIZE):
                theirs = _pointer(outputs[(RANK + shift) % SIZE], dtype)
                tl.store(theirs + shared, normed, mask=inside)
        else:
            tl.store(_pointer(outputs[RANK], dtype) + shared, normed, mask=inside)
    if TWO_SHOT:
        _meet(counters, MAX_PROGRAMS + program, launch, expired, polls, RANK, SIZE)


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    """One that is known to be aligned for wide accesses."""
    return tl.multiple_of(address.to(tl.pointer_type(dtype)), 16)


def gather(peers: Peers, values: Tensor, inboxes: tuple[int, ...]) -> None:
    """Write this rank's values to all ranks, and wait for those of the others.

    Args:
        peers: the ranks.
        values: int64 ``[n]``.
        inboxes: addresses of each rank's int64 ``[size, n]``, of which row r is rank r's. NOTE: as
            with partial sums, neighbouring launches use different ones.
    """
    count = values.numel()
    programs = min(triton.cdiv(count, GATHER_BLOCK), peers.max_programs)
    _gather_kernel[(programs,)](
        values, inboxes, peers.counters, peers.launches, peers.expired, count, peers.max_polls,
        BLOCK=GATHER_BLOCK, RANK=peers.rank, SIZE=peers.size, num_warps=4, **pdl_options(),
    )  # fmt: skip


@triton.jit(do_not_specialize=["values", "count", "polls"])
def _gather_kernel(
    values, inboxes, counters, launches, expired, count, polls,
    BLOCK: tl.constexpr, RANK: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    pdl_wait(PDL)
    pdl_trigger(PDL)
    launch = tl.load(launches + program) + 1
    for start in range(program * BLOCK, count, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        own = tl.load(values + place, mask=place < count)
        for rank in tl.static_range(SIZE):
            inbox = inboxes[rank].to(tl.pointer_type(tl.int64)) + RANK * count
            tl.store(inbox + place, own, mask=place < count)
    _meet(counters, program, launch, expired, polls, RANK, SIZE)
    tl.store(launches + program, launch)  # all threads have read it
