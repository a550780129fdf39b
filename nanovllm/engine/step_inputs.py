"""The integers of one step, packed into one flat int32 buffer.

One buffer means one copy to the device, one broadcast to the other ranks, and, for CUDA graphs, one
static tensor whose views never move. In front are the token ids of all micro-batches and the rows
that are sampled; then come the micro-batches, one after the other. A micro-batch's rows are those
that decode, one token each, padding behind them, then the tokens of prompts. The layouts name and
place the fields; `StepInputs` writes them with numpy, without a Python loop over tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heapreplace
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import torch

from nanovllm import kernels
from nanovllm.engine.block_manager import PADDING_BLOCK
from nanovllm.engine.scheduler import Chunk
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.layers.attention import (
    AttentionBackend,
    AttentionMetadata,
    DecodeMetadata,
    PrefillMetadata,
)
from nanovllm.models.stage import MicroBatch, StepTensors
from nanovllm.sampling_params import SamplingParams

Shapes = dict[str, tuple[int, ...]]
Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class RowsLayout:
    """Sizes of one micro-batch, and so the places of its fields.

    Attributes:
        decode_rows: rows that decode, with padding.
        prompts: sequences of which more than one token is read.
        prompt_tokens: tokens of those, together.
        longest_prompt: most tokens of one.
        max_blocks: width of the block tables.
        plan_size: integers of the attention back end's own part.
    """

    decode_rows: int
    prompts: int
    prompt_tokens: int
    longest_prompt: int
    max_blocks: int
    plan_size: int

    @property
    def num_tokens(self) -> int:
        return self.decode_rows + self.prompt_tokens

    @property
    def shapes(self) -> Shapes:
        """Shape of each field, in order."""
        tokens, sequences = self.num_tokens, self.decode_rows + self.prompts
        fields: Shapes = {
            "positions": (tokens,),
            "slot_mapping": (tokens,),
            "context_lens": (sequences,),
            "block_tables": (sequences, self.max_blocks),
        }
        if self.decode_rows:
            fields["decode_plan"] = (self.plan_size,)
        if self.prompts:
            fields["cu_seqlens_q"] = (self.prompts + 1,)
        return fields


@dataclass(frozen=True)
class StepLayout:
    """Sizes of a step: what a rank must know to run it.

    Attributes:
        plan: number of its plan.
        is_decode: whether it is one token of each sequence, and all are sampled.
        num_samples: rows that are sampled.
        micro_batches: at least one.
    """

    plan: int
    is_decode: bool
    num_samples: int
    micro_batches: tuple[RowsLayout, ...]

    @classmethod
    def from_integers(cls, integers: Sequence[int]) -> StepLayout:
        """The inverse of `to_integers`."""
        plan, is_decode, samples, *sizes = integers
        width = len(dataclasses.fields(RowsLayout))
        starts = range(0, len(sizes), width)
        rows = tuple(RowsLayout(*sizes[start : start + width]) for start in starts)
        return cls(plan, bool(is_decode), samples, rows)

    def to_integers(self) -> list[int]:
        """For the other ranks."""
        sizes = chain.from_iterable(dataclasses.astuple(rows) for rows in self.micro_batches)
        return [self.plan, int(self.is_decode), self.num_samples, *sizes]

    @cached_property
    def num_tokens(self) -> int:
        return sum(rows.num_tokens for rows in self.micro_batches)

    @cached_property
    def places(self) -> list[dict[str, tuple[int, int, tuple[int, ...]]]]:
        """Begin, end and shape of the step's own fields, then of those of each micro-batch."""
        step: Shapes = {"input_ids": (self.num_tokens,)}
        if not self.is_decode or len(self.micro_batches) > 1:  # else it is all rows in order
            step["sample_rows"] = (self.num_samples,)
        places, start, first = [], 0, 0
        for shapes in (step, *(rows.shapes for rows in self.micro_batches)):
            fields = {}
            for name, shape in shapes.items():
                fields[name] = start, start + prod(shape), shape
                start += prod(shape)
            places.append(fields)
        for rows, fields in zip(self.micro_batches, places[1:], strict=True):
            fields["input_ids"] = first, first + rows.num_tokens, (rows.num_tokens,)
            first += rows.num_tokens
        return places

    @cached_property
    def size(self) -> int:
        """Integers in the flat buffer."""
        return max(end for fields in self.places for _, end, _ in fields.values())

    def views(self, flat: Any) -> list[dict[str, Any]]:
        """Fields of a flat numpy array or tensor, as views: the step's, then each micro-batch's."""
        return [
            {name: flat[begin:end].reshape(shape) for name, (begin, end, shape) in fields.items()}
            for fields in self.places
        ]


def micro_batches(
    layout: StepLayout, flat: torch.Tensor, last_tokens: torch.Tensor, workspace: Any
) -> tuple[list[MicroBatch], torch.Tensor | None]:
    """The micro-batches of a step, and the rows of all of them together that are sampled.

    Args:
        layout: of `flat`.
        flat: int32, on the device. Input ids below 0 stand for tokens that the host does not know
            yet: -1 - seat is the token in `last_tokens`.
        last_tokens: int64 [seats], on the device.
        workspace: of decode attention.

    Returns:
        Views into `flat`; the rows are int32 [num_samples], or None: all, in order.
    """
    step, *parts = layout.views(flat)
    input_ids = kernels.resolve_tokens(step["input_ids"], last_tokens)
    batches: list[MicroBatch] = []
    sizes = [rows.num_tokens for rows in layout.micro_batches]
    for rows, fields, ids in zip(layout.micro_batches, parts, input_ids.split(sizes), strict=True):
        metadata = _metadata(rows, fields, workspace)
        batches.append(MicroBatch(len(batches), StepTensors(ids, fields["positions"], metadata)))
    return batches, step.get("sample_rows")


def _metadata(
    rows: RowsLayout, fields: dict[str, torch.Tensor], workspace: Any
) -> AttentionMetadata:
    count, tables, lens = rows.decode_rows, fields["block_tables"], fields["context_lens"]
    decode = prefill = None
    if count:
        decode = DecodeMetadata(tables[:count], lens[:count], fields["decode_plan"], workspace)
    if rows.prompts:
        starts, longest = fields["cu_seqlens_q"], rows.longest_prompt
        prefill = PrefillMetadata(tables[count:], lens[count:], starts, longest)
    return AttentionMetadata(fields["slot_mapping"], decode, prefill)


def made_up_chunk(start: int, end: int, blocks: Sequence[int] = ()) -> Chunk:
    """Tokens `start` to `end` of a sequence that nobody asked for, to warm up and to time steps.

    It is in the padding block but for the `blocks` given.
    """
    seq = EngineSequence(
        -1, [0] * end, SamplingParams(), frozenset(), end, 0, block_table=list(blocks)
    )
    return Chunk(seq, start, end, samples=True)


def decode_first(chunks: Sequence[Chunk]) -> list[int]:
    """Numbers of the chunks in the order of a micro-batch: those of one token, then the others."""
    return sorted(range(len(chunks)), key=lambda i: chunks[i].end - chunks[i].start > 1)


def balance(context_lens: np.ndarray, layout: StepLayout) -> list[Sequence[int]]:
    """Deals sequences that decode out to micro-batches: the same work for each.

    What differs between them is attention's work, hence the context tokens. Long sequences choose
    first, and each goes where the fewest tokens are so far (the LPT rule of scheduling, Graham,
    1969), as long as there is a row left.

    Args:
        context_lens: int [N], tokens of each sequence.
        layout: of a decode step of at least N rows.

    Returns:
        The numbers of each micro-batch's sequences.
    """
    if len(layout.micro_batches) == 1:
        return [range(len(context_lens))]
    parts: list[Sequence[int]] = [[] for _ in layout.micro_batches]
    add = [part.append for part in parts]  # type: ignore[attr-defined]
    room = [rows.decode_rows for rows in layout.micro_batches]
    least = [(0, batch) for batch in range(len(room))]  # a heap
    longest_first = np.argsort(-context_lens, kind="stable")
    lengths = context_lens[longest_first].tolist()
    for number, length in zip(longest_first.tolist(), lengths, strict=True):
        tokens, batch = least[0]
        add[batch](number)
        room[batch] -= 1
        if room[batch]:
            heapreplace(least, (tokens + length, batch))
        else:
            heappop(least)
    return parts


class StepInputs:
    """Lays the inputs of steps out, and fills them.

    Args:
        block_size: tokens of a KV block.
        max_blocks: width of the block tables.
        backend: of attention, which has a part of its own in them.
    """

    def __init__(self, block_size: int, max_blocks: int, backend: AttentionBackend) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.backend = backend

    def decode_layout(self, plan: int, size: int, micro_batches: int) -> StepLayout:
        """A decode step of `size` rows, as evenly as may be in so many micro-batches."""
        rows = [size // micro_batches + (i < size % micro_batches) for i in range(micro_batches)]
        return StepLayout(plan, True, size, tuple(self._rows(count, []) for count in rows))

    def mixed_layout(self, plan: int, parts: Sequence[Sequence[Chunk]]) -> StepLayout:
        """A step of any chunks, those of each micro-batch in the order of `decode_first`."""
        sizes = [[chunk.end - chunk.start for chunk in chunks] for chunks in parts]
        rows = [self._rows(part.count(1), [size for size in part if size > 1]) for part in sizes]
        samples = sum(chunk.samples for chunks in parts for chunk in chunks)
        return StepLayout(plan, False, samples, tuple(rows))

    def fill(
        self,
        layout: StepLayout,
        chunks: Sequence[Chunk],
        parts: Sequence[Sequence[int]],
        flat: np.ndarray,
    ) -> None:
        """Writes the fields of a step.

        Args:
            layout: of `flat`.
            chunks: what the step computes.
            parts: numbers of the chunks in each micro-batch, those of one token first. Rows that
                are left are padding: one token of context in the padding block, and no work for
                attention.
            flat: int32 [layout.size], overwritten.
        """
        step, *fields = layout.views(flat)
        last_rows = np.zeros(len(chunks), np.int64)
        first = 0
        for rows, part, views in zip(layout.micro_batches, parts, fields, strict=True):
            own, count = [chunks[i] for i in part], len(part) - rows.prompts
            ends = _fill_places(rows, own, count, views)
            last = np.arange(len(part))
            if rows.decode_rows:
                self._fill_decode(rows, own[:count], ends[:count], views)
            if rows.prompts:
                last[count:] = self._fill_prompts(rows, own[count:], ends[count:], views)
            last_rows[part] = last + first
            first += rows.num_tokens
        if "sample_rows" in step:
            if not layout.is_decode:
                last_rows = last_rows[[chunk.samples for chunk in chunks]]
            step["sample_rows"][: len(last_rows)] = last_rows
            step["sample_rows"][len(last_rows) :] = 0

    def _rows(self, decode_rows: int, prompts: list[int]) -> RowsLayout:
        plan_size = self.backend.plan_size(decode_rows)
        longest = max(prompts, default=0)
        return RowsLayout(
            decode_rows, len(prompts), sum(prompts), longest, self.max_blocks, plan_size
        )

    def _fill_decode(
        self, layout: RowsLayout, chunks: Sequence[Chunk], ends: np.ndarray, views: Fields
    ) -> None:
        count, rows, positions = len(chunks), layout.decode_rows, ends - 1
        ids, slots = views["input_ids"], views["slot_mapping"]
        ids[:count] = [_token(chunk.seq, chunk.start) for chunk in chunks]
        views["positions"][:count] = positions
        slots[:count] = self._slots(views["block_tables"], np.arange(count), positions)
        ids[count:rows] = views["positions"][count:rows] = 0
        slots[count:rows] = PADDING_BLOCK * self.block_size
        lengths = np.zeros(rows, np.int32)
        lengths[:count] = ends
        views["decode_plan"][:] = self.backend.plan(lengths)

    def _fill_prompts(
        self, layout: RowsLayout, chunks: Sequence[Chunk], ends: np.ndarray, views: Fields
    ) -> np.ndarray:
        """Returns the row of each chunk's last token."""
        starts, rows = np.array([chunk.start for chunk in chunks], np.int32), layout.decode_rows
        firsts = views["cu_seqlens_q"]
        _running_sum(firsts, ends - starts)
        owners = np.repeat(np.arange(len(chunks)), ends - starts)
        positions = np.arange(len(owners), dtype=np.int32) + (starts - firsts[:-1])[owners]
        views["input_ids"][rows:] = list(chain.from_iterable(map(_tokens, chunks)))
        views["positions"][rows:] = positions
        views["slot_mapping"][rows:] = self._slots(views["block_tables"][rows:], owners, positions)
        return rows + firsts[1:] - 1

    def _slots(
        self, block_tables: np.ndarray, rows: np.ndarray, positions: np.ndarray
    ) -> np.ndarray:
        """Cache slots of tokens at `positions` of the sequences in `rows`."""
        blocks = block_tables[rows, positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


def _fill_places(
    layout: RowsLayout, chunks: Sequence[Chunk], count: int, views: Fields
) -> np.ndarray:
    """Writes where sequences stand, the first `count` of which decode; returns their lengths."""
    ends = np.array([chunk.end for chunk in chunks], np.int32)
    tables, lens = [chunk.seq.block_table for chunk in chunks], views["context_lens"]
    rows = layout.decode_rows
    lens[:count], lens[count:rows], lens[rows:] = ends[:count], 1, ends[count:]
    blocks = np.zeros(len(lens), np.int32)
    blocks[:count] = [len(table) for table in tables[:count]]
    blocks[rows:] = [len(table) for table in tables[count:]]
    target = views["block_tables"]
    target.fill(PADDING_BLOCK)
    held = np.arange(layout.max_blocks) < blocks[:, None]
    target[held] = np.fromiter(chain.from_iterable(tables), np.int32, int(blocks.sum()))
    return ends


def _token(seq: EngineSequence, position: int) -> int:
    """A token of a sequence, or -1 - seat if only the device knows it so far."""
    tokens = seq.token_ids
    return tokens[position] if position < len(tokens) else -1 - seq.seat


def _tokens(chunk: Chunk) -> list[int]:
    """The tokens of a chunk, of which the last may be known on the device only."""
    known = chunk.seq.token_ids[chunk.start : chunk.end]
    return known if len(known) == chunk.end - chunk.start else [*known, -1 - chunk.seq.seat]


def _running_sum(target: np.ndarray, values: np.ndarray) -> None:
    """target[i] = sum of the first i values."""
    target[0] = 0
    np.cumsum(values, out=target[1:])
