"""Linear layers on a part of the GPU: as many programs as the partition has SMs, and no more.

A library's matrix product is planned for all SMs of the device. On a partition its last round of
tiles may leave most SMs idle. Here one program runs on each of the partition's SMs and takes tile
after tile of the output, so that the tile can be chosen to divide the work evenly:

- Tiles are numbered so that neighbours share weights, band of rows by band of rows. Program p
  takes the tiles p, p + P, ... in one loop over all their steps; the loads of a tile's first
  steps are under way while the tile before is finished.
- If the tiles do not divide evenly, the last ones may be cut ("stream-K", Osama et al., 2023,
  arXiv:2301.03598): their steps are divided into equal contiguous shares, one a program. A cut
  tile leaves a float32 partial result in each share it touches; the program that stores the
  last of them adds them up in the order of the shares. So results do not depend on who is last.
- For the gated MLP a tile computes the same features of both halves of the weight, and ends with
  ``silu(gate) * up``, which saves writing and reading ``[N, 2I]``.

Products are added up in float32 and rounded once. Floor: 2 N M K operations on the partition.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanovllm.kernels.gemm_tiles import (
    finish,
    halves,
    join_partials,
    load_weight,
    load_x,
    store_partial,
)
from nanovllm.kernels.gemm_tunings import GemmTuning, tiles_to_cut
from nanovllm.kernels.shares import share_begin, share_of

_MIN_SHARE = 4  # steps of a cut tile that are worth a program


class GemmWorkspace:
    """The SMs of a partition, and the counters with which its programs join cut tiles.

    Args:
        num_sms: SMs of the partition, or of the whole device; programs of a launch.
        device: where the counters live, one int32 for each program.

    Raises:
        ValueError: num_sms is under 1.
    """

    # NOTE: launches that may run at the same time (two streams) need a workspace each.
    def __init__(self, num_sms: int, device: torch.device | str) -> None:
        if num_sms < 1:
            raise ValueError(f"num_sms is {num_sms}; it must be at least 1")
        self.num_sms = num_sms
        # Partials stored so far of the cut tile that begins in a program's share; 0 between
        # launches, because whoever joins a tile resets its count.
        self.arrivals = torch.zeros(num_sms, dtype=torch.int32, device=device)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, workspace: GemmWorkspace, tuning: GemmTuning
) -> Tensor:
    """``x @ weight.T + bias`` for ``x [N, K]``, ``weight [M, K]`` and ``bias [M]`` -> ``[N, M]``.

    Args:
        x, weight, bias: all bfloat16, all float16 or all float32, on one device.
        workspace: the SMs to run on; used by one launch at a time.
        tuning: one of ``gemm_tunings.candidates``, say. Matrices that the bulk copy engine
            cannot address (rows of no multiple of 16 bytes) are loaded without it.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(
            f"bias is {list(bias.shape)} {bias.dtype}; it must be [{weight.shape[0]}] {x.dtype}"
        )
    return _launch(x, weight, bias, workspace, tuning, gated=False)


def linear_silu_mul(
    x: Tensor, gate_up_weight: Tensor, workspace: GemmWorkspace, tuning: GemmTuning
) -> Tensor:
    """``silu(x @ gate.T) * (x @ up.T)`` for ``[2I, K]``, whose first half is the gate.

    ``x [N, K]`` -> ``[N, I]``; arguments and errors as for ``linear``.
    """
    if gate_up_weight.shape[0] % 2:
        raise ValueError(f"gate_up_weight has {gate_up_weight.shape[0]} rows; they must be even")
    return _launch(x, gate_up_weight, None, workspace, tuning, gated=True)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    workspace: GemmWorkspace,
    tuning: GemmTuning,
    gated: bool,
) -> Tensor:
    rows, inner = x.shape
    if weight.shape[1] != inner or weight.dtype != x.dtype:
        raise ValueError(
            f"weight is {list(weight.shape)} {weight.dtype}; it must be [M, {inner}] {x.dtype}"
        )
    x, weight = x.contiguous(), weight.contiguous()
    halves = 2 if gated else 1
    features = weight.shape[0] // halves
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    if rows == 0:
        return out
    block_m, block_n, block_k = tuning.block_m, tuning.block_n, tuning.block_k
    width = block_n // halves
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(features, width)
    steps = triton.cdiv(inner, block_k)
    programs, cut = min(workspace.num_sms, tiles), 0
    if tuning.stream_k:
        programs = min(workspace.num_sms, max(tiles, tiles * steps // _MIN_SHARE))
        cut = tiles_to_cut(tiles, programs)
    partials = None
    if cut:
        partials = torch.empty(2 * programs, block_m, block_n, dtype=torch.float32, device=x.device)
    aligned = [inner * x.element_size(), features * x.element_size()]
    aligned += [x.data_ptr(), weight.data_ptr()]
    tma = tuning.tma and all(offset % 16 == 0 for offset in aligned)
    tile_of_x, tile_of_weight, tile_of_out = x, weight, out
    if tma:
        tile_of_x = _descriptor(x, block_m, block_k)
        halves_of_weight = weight.view(2, features, inner) if gated else weight
        blocks = (2, width, block_k) if gated else (width, block_k)
        tile_of_weight = _descriptor(halves_of_weight, *blocks)
        tile_of_out = _descriptor(out, block_m, block_n // 2)
    _gemm_kernel[(programs,)](
        tile_of_x, tile_of_weight, bias, tile_of_out, partials, workspace.arrivals,
        rows, features, inner, cut,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=tuning.group,
        GATED=gated,
        CUT=cut > 0,
        TMA=tma,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )  # fmt: skip
    return out


def _descriptor(matrix: Tensor, *block: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor  # not in the older Tritons

    return TensorDescriptor.from_tensor(matrix, list(block))


@triton.jit(do_not_specialize=["rows", "cut"])
def _gemm_kernel(
    x, weight, bias, out, partials, arrivals, rows, features, inner, cut,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, CUT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(features, WIDTH)
    steps = tl.cdiv(inner, BLOCK_K)
    whole = tiles_m * tiles_n - cut
    # A program's pieces: its whole tiles, then those that its share of the others touches.
    num_whole = tl.cdiv(whole - program, tl.num_programs(0))
    total = cut * steps
    begin = share_begin(program, total) if CUT else 0
    end = share_begin(program + 1, total) if CUT else 0

    piece = 0
    tile, first, last = _piece(piece, num_whole, whole, begin, end, steps, CUT)
    m, n = _place(tile, tiles_m, tiles_n, GROUP)
    step = first
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(num_whole * steps + end - begin):
        # NOTE: every load begins at a whole multiple of BLOCK_K; TMA cannot do others.
        left = load_x(x, m, step, rows, inner, BLOCK_M, BLOCK_K, TMA)
        right = load_weight(weight, n, step, features, inner, WIDTH, BLOCK_N, BLOCK_K, TMA)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
        ends = step == last
        if ends:
            if (not CUT) or (last - first == steps - 1):
                low, high = halves(acc)
                finish(out, bias, low, high, m, n, rows, features, BLOCK_M, BLOCK_N, GATED, TMA)
            else:
                store_partial(partials, acc, first == 0, BLOCK_M, BLOCK_N)
            acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        # NOTE: outside the `if`, where it would keep Triton from loading ahead.
        piece += ends.to(tl.int32)
        tile, first, last = _piece(piece, num_whole, whole, begin, end, steps, CUT)
        m, n = _place(tile, tiles_m, tiles_n, GROUP)
        step = tl.where(ends, first, step + 1)

    if CUT:
        tl.debug_barrier()  # all partials are stored before one thread announces them
        # At most two tiles of a share are cut: the one it begins in and the one it ends in.
        for side in range(2):
            index = tl.where(side == 0, begin, end - 1) // steps
            first_share = share_of(index * steps, total)
            last_share = share_of(index * steps + steps - 1, total)
            other = (side == 0) | (index != begin // steps)
            if (first_share < last_share) & other & (begin < end):
                arrived = tl.atomic_add(arrivals + first_share, 1, sem="acq_rel", scope="gpu")
                if arrived == last_share - first_share:
                    tl.store(arrivals + first_share, 0)
                    low, high = join_partials(partials, first_share, last_share, BLOCK_M, BLOCK_N)
                    m, n = _place(whole + index, tiles_m, tiles_n, GROUP)
                    finish(out, bias, low, high, m, n, rows, features, BLOCK_M, BLOCK_N, GATED, TMA)


@triton.jit
def _piece(piece, num_whole, whole, begin, end, steps, CUT: tl.constexpr):
    """A program's piece: its tile, and the first and the last step to take of it."""
    tile = tl.program_id(0) + piece * tl.num_programs(0)
    first = piece * 0
    last = first + steps - 1
    if CUT:
        is_whole = piece < num_whole
        index = begin // steps + piece - num_whole  # among the cut tiles
        tile = tl.where(is_whole, tile, whole + index)
        first = tl.where(is_whole, first, tl.maximum(begin - index * steps, 0))
        last = tl.where(is_whole, last, tl.minimum(end - 1 - index * steps, last))
    return tile, first, last


@triton.jit
def _place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: down a band of GROUP rows of tiles, then to the next column."""
    band = GROUP * tiles_n
    top = tile // band * GROUP
    height = tl.maximum(tl.minimum(tiles_m - top, GROUP), 1)  # 1: beyond the last tile
    within = tile % band
    return top + within % height, within // height
