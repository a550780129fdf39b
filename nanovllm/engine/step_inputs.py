"""The integers of one step, packed into one flat int32 buffer.

One buffer means one copy to the device, one broadcast to the other ranks, and, for CUDA graphs, one
static tensor whose views never move. `InputLayout` names and places the fields; `fill_inputs`
writes them from the scheduler's step with numpy, without a Python loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, pairwise
from math import prod
from typing import Any

import numpy as np
import torch

from nanovllm import kernels
from nanovllm.engine.block_manager import PADDING_BLOCK
from nanovllm.engine.scheduler import Chunk
from nanovllm.layers.attention import DecodeMetadata, Metadata, PrefillMetadata
from nanovllm.models.qwen3 import sequence_starts


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
    """

    is_decode: bool
    num_tokens: int
    num_seqs: int
    num_samples: int
    max_blocks: int
    max_seqlen_q: int
    pipelined: bool = False

    @classmethod
    def decode(cls, num_seqs: int, max_blocks: int, pipelined: bool = False) -> InputLayout:
        """Layout of a decode step of `num_seqs` sequences."""
        return cls(True, num_seqs, num_seqs, num_seqs, max_blocks, 1, pipelined)

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
            fields["tile_offsets"] = (n + 1,)
        else:
            fields["cu_seqlens_q"] = (n + 1,)
        if self.pipelined or not self.is_decode:
            fields["sample_rows"] = (self.num_samples,)
        return fields

    @property
    def size(self) -> int:
        """Integers in the flat buffer."""
        return sum(prod(shape) for shape in self.shapes.values())

    def views(self, flat: Any) -> dict[str, Any]:
        """The fields of a flat numpy array or tensor, as views into it."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            size = prod(shape)
            views[name] = flat[start : start + size].reshape(shape)
            start += size
        return views


@dataclass(frozen=True)
class StepTensors:
    """What the model is called with: T tokens of N sequences, S of which sample.

    Attributes:
        input_ids, positions: integer [T].
        metadata: of attention; None: no KV cache, each position 0 begins a sequence.
        sample_rows: int32 [S], tokens whose logits are wanted, in that order; None: all.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: Metadata | None
    sample_rows: torch.Tensor | None = None

    @classmethod
    def of(
        cls, layout: InputLayout, flat: torch.Tensor, last_tokens: torch.Tensor, workspace: Any
    ) -> StepTensors:
        """Views into `flat`, a device tensor laid out as `layout`.

        Input ids below 0 stand for tokens that the host does not know yet: -1 - seat is the token
        in `last_tokens` [seats].
        """
        views = layout.views(flat)
        input_ids = views["input_ids"]
        if layout.is_decode:
            input_ids = kernels.resolve_tokens(input_ids, last_tokens)
        places = (views["slot_mapping"], views["block_tables"], views["context_lens"])
        metadata: Metadata
        if layout.is_decode:
            metadata = DecodeMetadata(*places, views["tile_offsets"], workspace)
        else:
            metadata = PrefillMetadata(*places, views["cu_seqlens_q"], layout.max_seqlen_q)
        return cls(input_ids, views["positions"], metadata, views.get("sample_rows"))

    def check(self) -> None:
        """Raises ValueError unless this is a decode step whose fields fit each other."""
        places, n = self.metadata, self.input_ids.numel()
        expected = {"input_ids": (self.input_ids, (n,)), "positions": (self.positions, (n,))}
        if isinstance(places, DecodeMetadata):
            expected |= {
                "metadata.slot_mapping": (places.slot_mapping, (n,)),
                "metadata.block_tables": (places.block_tables, (n, *places.block_tables.shape[1:])),
                "metadata.context_lens": (places.context_lens, (n,)),
                "metadata.tile_offsets": (places.tile_offsets, (n + 1,)),
            }
        elif places is not None:
            kind = type(places).__name__
            raise ValueError(f"metadata must be DecodeMetadata or None, not {kind}")
        for name, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape or not n:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}; for {n} tokens it must be {shape}, "
                    "and there must be at least one token"
                )
        positions = [-1, *self.positions.tolist()] if places is None else []
        if any(position not in (0, before + 1) for before, position in pairwise(positions)):
            raise ValueError(
                "positions must count up from 0 in each sequence where there is no metadata to "
                "say what the KV cache holds"
            )

    def split(self, cut_at: int | None = None) -> list[StepTensors]:
        """Cuts a decode step in two after its first `cut_at` sequences (default: half of them).

        A step of a single sequence stays whole.

        Raises:
            ValueError: a part would be empty.
        """
        starts = None if self.metadata is not None else sequence_starts(self.positions).tolist()
        count = len(self.input_ids) if starts is None else len(starts) - 1
        if cut_at is None:
            cut_at = (count + 1) // 2
            if cut_at == count:
                return [self]
        if not 0 < cut_at < count:
            raise ValueError(
                f"cut_at={cut_at!r} is not allowed for {count} sequences: it must be from 1 to "
                f"{count - 1}"
            )
        token = cut_at if starts is None else starts[cut_at]
        halves: tuple[Metadata | None, Metadata | None] = (None, None)
        if isinstance(self.metadata, DecodeMetadata):
            halves = self.metadata.split(cut_at)
        return [
            StepTensors(self.input_ids[:token], self.positions[:token], halves[0]),
            StepTensors(self.input_ids[token:], self.positions[token:], halves[1]),
        ]


def fill_inputs(
    layout: InputLayout,
    chunks: list[Chunk],
    block_size: int,
    tile_size: int,
    flat: np.ndarray,
    rows: np.ndarray | None = None,
) -> None:
    """Writes the fields of `chunks` into `flat`, int32 [layout.size].

    Args:
        layout: of `flat`.
        chunks: what the step computes.
        block_size: tokens of a KV block.
        tile_size: the attention back end's.
        flat: is overwritten.
        rows: in decode, the row of each chunk, in any order; default: the first rows. All other
            rows are padding: one token of context, in the padding block, and no KV tiles, so that
            attention skips them.
    """
    views = layout.views(flat)
    rows = np.arange(len(chunks)) if rows is None else rows
    _fill_block_tables(views["block_tables"], chunks, rows)
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    if layout.is_decode:
        _fill_decode(views, chunks, rows, starts, block_size, tile_size)
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
    tile_size: int,
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
    tiles = np.zeros(len(views["context_lens"]), np.int32)
    tiles[rows] = -(-(positions + 1) // tile_size)
    _running_sum(views["tile_offsets"], tiles)


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
