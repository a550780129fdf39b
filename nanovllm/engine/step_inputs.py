"""The integers of one step, packed into one flat int32 buffer.

One buffer means one copy to the device, one broadcast to the other ranks, and, for CUDA graphs, one
static tensor whose views never move. `InputLayout` names and places the fields; `fill_inputs`
writes them from the scheduler's step with numpy, without a Python loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain, pairwise, starmap
from math import prod
from typing import Any

import numpy as np
import torch

from nanovllm import kernels
from nanovllm.engine.block_manager import PADDING_BLOCK
from nanovllm.engine.scheduler import Chunk
from nanovllm.layers.attention import (
    AttentionBackend,
    AttentionMetadata,
    DecodeMetadata,
    PrefillMetadata,
)
from nanovllm.models.stage import StepTensors


@dataclass(frozen=True)
class InputLayout:
    """Sizes of a step, and so the places of its fields in the flat buffer.

    Attributes:
        is_decode: one token a sequence, and all of them sample.
        num_tokens: T, new tokens.
        num_seqs: N, sequences.
        num_samples: S, sequences that draw a token.
        max_blocks: width of the block tables.
        max_seqlen_q: most new tokens of a sequence.
        pipelined: whether a decode step is run as a pipeline, its sequences dealt out to two
            micro-batches.
        plan_size: integers of the attention back end's plans, one for each micro-batch.
    """

    is_decode: bool
    num_tokens: int
    num_seqs: int
    num_samples: int
    max_blocks: int
    max_seqlen_q: int
    pipelined: bool = False
    plan_size: int = 0

    @classmethod
    def decode(
        cls, num_seqs: int, max_blocks: int, backend: AttentionBackend, pipelined: bool = False
    ) -> InputLayout:
        """Layout of a decode step of `num_seqs` sequences."""
        layout = cls(True, num_seqs, num_seqs, num_seqs, max_blocks, 1, pipelined)
        return replace(layout, plan_size=layout.parts(backend)[-1][1].stop)

    @classmethod
    def prefill(cls, chunks: list[Chunk], max_blocks: int) -> InputLayout:
        """Layout of a prefill step."""
        sizes = [chunk.end - chunk.start for chunk in chunks]
        samples = sum(chunk.samples for chunk in chunks)
        return cls(False, sum(sizes), len(chunks), samples, max_blocks, max(sizes))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each field, in order."""
        n = self.num_seqs
        fields: dict[str, tuple[int, ...]] = {
            "input_ids": (self.num_tokens,),
            "positions": (self.num_tokens,),
            "slot_mapping": (self.num_tokens,),
            "context_lens": (n,),
            "block_tables": (n, self.max_blocks),
        }
        if self.is_decode:
            fields["plan"] = (self.plan_size,)
        else:
            fields["cu_seqlens_q"] = (n + 1,)
        if self.pipelined or not self.is_decode:
            fields["sample_rows"] = (self.num_samples,)
        return fields

    @property
    def size(self) -> int:
        """Integers in the flat buffer."""
        return sum(prod(shape) for shape in self.shapes.values())

    def parts(self, backend: AttentionBackend) -> list[tuple[slice, slice]]:
        """Of a decode step, the rows of each micro-batch, and its part of the plans."""
        first = (self.num_seqs + 1) // 2 if self.pipelined else self.num_seqs
        counts = [first, self.num_seqs - first] if self.pipelined else [first]
        rows = np.cumsum([0, *counts]).tolist()
        plans = np.cumsum([0, *map(backend.plan_size, counts)]).tolist()
        return list(
            zip(starmap(slice, pairwise(rows)), starmap(slice, pairwise(plans)), strict=True)
        )

    def views(self, flat: Any) -> dict[str, Any]:
        """The fields of a flat numpy array or tensor, as views into it."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            size = prod(shape)
            views[name] = flat[start : start + size].reshape(shape)
            start += size
        return views


def step_tensors(
    layout: InputLayout,
    flat: torch.Tensor,
    last_tokens: torch.Tensor,
    backend: AttentionBackend,
    workspace: Any,
) -> list[StepTensors]:
    """The step's micro-batches, as views into `flat`, a device tensor laid out as `layout`.

    Input ids below 0 stand for tokens that the host does not know yet: -1 - seat is the token in
    `last_tokens` [seats].
    """
    views = layout.views(flat)
    input_ids, positions, slots = (
        views[name] for name in ("input_ids", "positions", "slot_mapping")
    )
    tables, lengths = views["block_tables"], views["context_lens"]
    if not layout.is_decode:
        prefill = PrefillMetadata(tables, lengths, views["cu_seqlens_q"], layout.max_seqlen_q)
        metadata = AttentionMetadata(slots, prefill=prefill)
        return [StepTensors(input_ids, positions, metadata, views["sample_rows"])]
    input_ids = kernels.resolve_tokens(input_ids, last_tokens)
    return [
        StepTensors(
            input_ids[rows],
            positions[rows],
            AttentionMetadata(
                slots[rows],
                DecodeMetadata(tables[rows], lengths[rows], views["plan"][plan], workspace),
            ),
        )
        for rows, plan in layout.parts(backend)
    ]


def check_step(inputs: StepTensors, backend: AttentionBackend) -> None:
    """Raises ValueError unless the fields of a step fit each other."""
    n, metadata = inputs.input_ids.numel(), inputs.metadata
    expected = {
        "input_ids": (inputs.input_ids, (n,)),
        "positions": (inputs.positions, (n,)),
        "metadata.slot_mapping": (metadata.slot_mapping, (n,)),
    }
    for kind, part in (("decode", metadata.decode), ("prefill", metadata.prefill)):
        if part is not None:
            count = n if metadata.prefill is None else len(part.context_lens)
            width = part.block_tables.shape[1:]
            expected |= {
                f"metadata.{kind}.block_tables": (part.block_tables, (count, *width)),
                f"metadata.{kind}.context_lens": (part.context_lens, (count,)),
            }
    if metadata.decode is not None:
        size = backend.plan_size(len(metadata.decode.context_lens))
        expected["metadata.decode.plan"] = (metadata.decode.plan, (size,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape or not n:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; for {n} tokens it must be {shape}, "
                "and there must be at least one token"
            )


def cut_in_two(
    inputs: StepTensors, backend: AttentionBackend, cut_at: int | None = None
) -> list[StepTensors]:
    """Cuts a step of one kind of sequences after the first `cut_at` (default: half of them).

    A step of a single sequence stays whole. For steps from outside the engine: waits for the
    device, as decode is planned anew.

    Raises:
        ValueError: a part would be empty.
    """
    decode, prefill = inputs.metadata.decode, inputs.metadata.prefill
    count = sum(len(part.context_lens) for part in (decode, prefill) if part is not None)
    if cut_at is None:
        cut_at = (count + 1) // 2
        if cut_at == count:
            return [inputs]
    if not 0 < cut_at < count:
        raise ValueError(
            f"cut_at={cut_at!r} is not allowed for {count} sequences: it must be from 1 to "
            f"{count - 1}"
        )
    parts = []
    for rows in (slice(0, cut_at), slice(cut_at, count)):
        tokens = rows
        if decode is not None:
            lengths = decode.context_lens[rows]
            plan = torch.from_numpy(backend.plan(lengths.cpu().numpy())).to(lengths.device)
            tables = decode.block_tables[rows]
            decode_part = DecodeMetadata(tables, lengths, plan, decode.workspace)
            metadata = AttentionMetadata(inputs.metadata.slot_mapping[tokens], decode_part)
        if prefill is not None:
            starts = prefill.cu_seqlens_q[rows.start : rows.stop + 1]
            tokens = slice(int(starts[0]), int(starts[-1]))
            prefill_part = PrefillMetadata(
                prefill.block_tables[rows],
                prefill.context_lens[rows],
                starts - starts[0],
                prefill.max_seqlen_q,
            )
            slots = inputs.metadata.slot_mapping[tokens]
            metadata = AttentionMetadata(slots, prefill=prefill_part)
        parts.append(StepTensors(inputs.input_ids[tokens], inputs.positions[tokens], metadata))
    return parts


def fill_inputs(
    layout: InputLayout,
    chunks: list[Chunk],
    block_size: int,
    backend: AttentionBackend,
    flat: np.ndarray,
    rows: np.ndarray | None = None,
) -> None:
    """Writes the fields of `chunks` into `flat`, int32 [layout.size].

    Args:
        layout: of `flat`.
        chunks: what the step computes.
        block_size: tokens of a KV block.
        backend: of attention.
        flat: is overwritten.
        rows: in decode, the row of each chunk, in any order; default: the first rows. All other
            rows are padding: one token of context, in the padding block, and none in the plan, so
            that attention may skip them.
    """
    views = layout.views(flat)
    rows = np.arange(len(chunks)) if rows is None else rows
    _fill_block_tables(views["block_tables"], chunks, rows)
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    if layout.is_decode:
        _fill_decode(views, chunks, rows, starts, block_size)
        fill_plans(layout, backend, views, rows)
    else:
        _fill_prefill(views, chunks, starts, block_size)


def micro_batch_rows(context_lens: np.ndarray, size: int) -> np.ndarray:
    """Rows for sequences in a step of `size` rows that is cut in half: the same work in each half.

    What differs between the halves is attention's work, hence the context tokens. Long sequences
    choose first, and each goes where fewer tokens are so far (the LPT rule of scheduling, Graham,
    1969), as long as there is a row left.

    Args:
        context_lens: int [N], tokens of each sequence; N is at most `size`.
        size: rows of both halves; an odd one belongs to the first.

    Returns:
        int64 [N], the row of each sequence.
    """
    ends = ((size + 1) // 2, size)
    following, tokens = [0, ends[0]], [0, 0]
    rows = np.empty(len(context_lens), np.int64)
    longest_first = np.argsort(-context_lens, kind="stable").tolist()
    for i, length in zip(longest_first, context_lens[longest_first].tolist(), strict=True):
        half = int(tokens[1] < tokens[0])
        if following[half] == ends[half]:
            half = 1 - half
        rows[i] = following[half]
        following[half] += 1
        tokens[half] += length
    return rows


def _fill_decode(
    views: dict[str, np.ndarray],
    chunks: list[Chunk],
    rows: np.ndarray,
    positions: np.ndarray,
    block_size: int,
) -> None:
    for name in ("input_ids", "positions"):
        views[name].fill(0)
    views["slot_mapping"].fill(PADDING_BLOCK * block_size)
    views["context_lens"].fill(1)
    views["input_ids"][rows] = [_input_id(chunk) for chunk in chunks]
    views["positions"][rows] = positions
    views["slot_mapping"][rows] = _slots(views["block_tables"], rows, positions, block_size)
    views["context_lens"][rows] = positions + 1
    if "sample_rows" in views:
        views["sample_rows"].fill(0)
        views["sample_rows"][: len(rows)] = rows


def fill_plans(
    layout: InputLayout, backend: AttentionBackend, views: dict[str, np.ndarray], rows: np.ndarray
) -> None:
    """Has the back end plan attention of the sequences in `rows`; all others are padding."""
    lengths = np.zeros_like(views["context_lens"])
    lengths[rows] = views["context_lens"][rows]
    for part, plan in layout.parts(backend):
        views["plan"][plan] = backend.plan(lengths[part])


def _fill_prefill(
    views: dict[str, np.ndarray],
    chunks: list[Chunk],
    starts: np.ndarray,
    block_size: int,
) -> None:
    ends = np.array([chunk.end for chunk in chunks], np.int32)
    sizes = ends - starts
    _running_sum(views["cu_seqlens_q"], sizes)
    firsts = views["cu_seqlens_q"][:-1]
    rows = np.repeat(np.arange(len(chunks)), sizes)
    positions = np.arange(len(rows), dtype=np.int32) + (starts - firsts)[rows]
    views["input_ids"][:] = list(
        chain.from_iterable(chunk.seq.token_ids[chunk.start : chunk.end] for chunk in chunks)
    )
    views["positions"][:] = positions
    views["slot_mapping"][:] = _slots(views["block_tables"], rows, positions, block_size)
    views["context_lens"][:] = ends
    views["sample_rows"][:] = (firsts + sizes - 1)[[chunk.samples for chunk in chunks]]


def _fill_block_tables(target: np.ndarray, chunks: list[Chunk], rows: np.ndarray) -> None:
    """Writes the chunks' ragged block tables into `rows` of `target`; the rest is padding."""
    tables = [chunk.seq.block_table for chunk in chunks]
    lengths = np.zeros(len(target), np.int32)
    lengths[rows] = [len(table) for table in tables]
    target.fill(PADDING_BLOCK)
    # The mask below takes values row by row.
    tables = [tables[i] for i in np.argsort(rows).tolist()]
    held = np.arange(target.shape[1]) < lengths[:, None]
    target[held] = np.fromiter(chain.from_iterable(tables), np.int32, int(lengths.sum()))


def _input_id(chunk: Chunk) -> int:
    """The token that a decode chunk reads, or -1 - seat if only the device knows it so far."""
    tokens = chunk.seq.token_ids
    return tokens[chunk.start] if chunk.start < len(tokens) else -1 - chunk.seq.seat


def _slots(
    block_tables: np.ndarray, rows: np.ndarray, positions: np.ndarray, block_size: int
) -> np.ndarray:
    """Cache slots of tokens at `positions` of the sequences in `rows`."""
    return block_tables[rows, positions // block_size] * block_size + positions % block_size


def _running_sum(target: np.ndarray, values: np.ndarray) -> None:
    """target[i] = sum of the first i values."""
    target[0] = 0
    np.cumsum(values, out=target[1:])
