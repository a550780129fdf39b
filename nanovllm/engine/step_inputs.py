"""The integers of one step, packed into one flat int32 buffer.

One buffer means one copy to the device, one broadcast to the other ranks, and, for CUDA graphs, one
static tensor whose views never move. In front are the token ids of all micro-batches and the rows
that are sampled; then come the micro-batches, one after the other. A micro-batch's rows are those
that decode, one token each, padding behind them, then the tokens of prompts. The layouts name and
place the fields; `fill_inputs` writes them with numpy, without a Python loop over tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from nanovllm.layers.attention import DecodeMetadata, Metadata, PrefillMetadata
from nanovllm.models.stage import MicroBatch, MixedMetadata
from nanovllm.sampling_params import SamplingParams

Shapes = dict[str, tuple[int, ...]]


class TilePlan:
    """What the attention back end wants to know of rows that decode: a running count of KV tiles.

    Args:
        tile_size: tokens of a tile.
    """

    def __init__(self, tile_size: int) -> None:
        self.tile_size = tile_size

    def plan_size(self, num_rows: int) -> int:
        """Integers of the plan for so many rows."""
        return num_rows + 1

    def prepare(self, context_lens: np.ndarray, plan: np.ndarray) -> None:
        """Writes the plan for rows with so many tokens each, 0 for padding, into `plan`."""
        _running_sum(plan, -(-context_lens // self.tile_size))


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
    def decode(
        cls, plan: int, size: int, micro_batches: int, max_blocks: int, plan_size: Callable
    ) -> StepLayout:
        """A decode step of `size` rows, as evenly as may be in so many micro-batches."""
        rows = [size // micro_batches + (i < size % micro_batches) for i in range(micro_batches)]
        layouts = [RowsLayout(count, 0, 0, 0, max_blocks, plan_size(count)) for count in rows]
        return cls(plan, True, size, tuple(layouts))

    @classmethod
    def mixed(
        cls, plan: int, parts: Sequence[Sequence[Chunk]], max_blocks: int, plan_size: Callable
    ) -> StepLayout:
        """A step of any chunks, those of each micro-batch in the order of `decode_first`."""
        layouts = []
        for chunks in parts:
            sizes = [chunk.end - chunk.start for chunk in chunks]
            prompts = [size for size in sizes if size > 1]
            rows = len(sizes) - len(prompts)
            longest = max(prompts, default=0)
            layouts.append(
                RowsLayout(rows, len(prompts), sum(prompts), longest, max_blocks, plan_size(rows))
            )
        samples = sum(chunk.samples for chunks in parts for chunk in chunks)
        return cls(plan, False, samples, tuple(layouts))

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

    @property
    def num_tokens(self) -> int:
        return sum(rows.num_tokens for rows in self.micro_batches)

    @property
    def shapes(self) -> Shapes:
        """Shape of each field before the micro-batches' own."""
        fields: Shapes = {"input_ids": (self.num_tokens,)}
        if not self.is_decode or len(self.micro_batches) > 1:  # else it is all rows in order
            fields["sample_rows"] = (self.num_samples,)
        return fields

    @property
    def size(self) -> int:
        """Integers in the flat buffer."""
        fields = [self.shapes, *(rows.shapes for rows in self.micro_batches)]
        return sum(prod(shape) for shapes in fields for shape in shapes.values())

    def views(self, flat: Any) -> list[dict[str, Any]]:
        """Fields of a flat numpy array or tensor, as views: the step's, then each micro-batch's."""
        views, start = [], 0
        for shapes in (self.shapes, *(rows.shapes for rows in self.micro_batches)):
            fields = {}
            for name, shape in shapes.items():
                size = prod(shape)
                fields[name] = flat[start : start + size].reshape(shape)
                start += size
            views.append(fields)
        first = 0
        for rows, fields in zip(self.micro_batches, views[1:], strict=True):
            fields["input_ids"] = views[0]["input_ids"][first : first + rows.num_tokens]
            first += rows.num_tokens
        return views


@dataclass(frozen=True)
class StepTensors:
    """What stages read of a micro-batch of T tokens.

    Attributes:
        input_ids, positions: integer [T].
        metadata: of attention; None: no KV cache, each position 0 begins a sequence.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: Metadata | MixedMetadata | None


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
) -> Metadata | MixedMetadata:
    count, slots = rows.decode_rows, fields["slot_mapping"]
    tables, lens = fields["block_tables"], fields["context_lens"]
    decode = prefill = None
    if count:
        places = slots[:count], tables[:count], lens[:count]
        decode = DecodeMetadata(*places, fields["decode_plan"], workspace)
    if rows.prompts:
        places = slots[count:], tables[count:], lens[count:]
        prefill = PrefillMetadata(*places, fields["cu_seqlens_q"], rows.longest_prompt)
    if decode is not None and prefill is not None:
        return MixedMetadata(slots, decode, prefill)
    metadata = decode or prefill
    assert metadata is not None, "a micro-batch without rows"
    return metadata


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


def balance(context_lens: np.ndarray, layout: StepLayout) -> list[np.ndarray]:
    """Deals sequences that decode out to micro-batches: the same work for each.

    What differs between them is attention's work, hence the context tokens. Long sequences choose
    first, and each goes where the fewest tokens are so far (the LPT rule of scheduling, Graham,
    1969), as long as there is a row left.

    Args:
        context_lens: int [N], tokens of each sequence.
        layout: of a decode step of at least N rows.

    Returns:
        The numbers of each micro-batch's sequences, in ascending order.
    """
    if len(layout.micro_batches) == 1:
        return [np.arange(len(context_lens))]
    room = [rows.decode_rows for rows in layout.micro_batches]
    least = [(0, batch) for batch in range(len(room))]  # a heap
    chosen = np.empty(len(context_lens), np.int64)
    longest_first = np.argsort(-context_lens, kind="stable")
    places = []
    for length in context_lens[longest_first].tolist():
        tokens, batch = least[0]
        places.append(batch)
        room[batch] -= 1
        if room[batch]:
            heapreplace(least, (tokens + length, batch))
        else:
            heappop(least)
    chosen[longest_first] = places
    return [np.flatnonzero(chosen == batch) for batch in range(len(room))]


def fill_inputs(
    layout: StepLayout,
    chunks: Sequence[Chunk],
    parts: Sequence[Sequence[int] | np.ndarray],
    block_size: int,
    prepare: Callable[[np.ndarray, np.ndarray], None],
    flat: np.ndarray,
) -> None:
    """Writes the fields of a step.

    Args:
        layout: of `flat`.
        chunks: what the step computes.
        parts: numbers of the chunks in each micro-batch, those of one token first. Rows that are
            left are padding: one token of context, in the padding block, and no work for attention.
        block_size: tokens of a KV block.
        prepare: the attention back end's; see `TilePlan.prepare`.
        flat: int32 [layout.size], overwritten.
    """
    step, *fields = layout.views(flat)
    last_rows = np.zeros(len(chunks), np.int64)
    first = 0
    for rows, part, views in zip(layout.micro_batches, parts, fields, strict=True):
        own = [chunks[i] for i in part]
        last_rows[part] = first + _fill_rows(rows, own, block_size, prepare, views)
        first += rows.num_tokens
    if "sample_rows" in step:
        sampled = last_rows[[chunk.samples for chunk in chunks]]
        step["sample_rows"].fill(0)
        step["sample_rows"][: len(sampled)] = sampled


def _fill_rows(
    layout: RowsLayout,
    chunks: list[Chunk],
    block_size: int,
    prepare: Callable[[np.ndarray, np.ndarray], None],
    views: dict[str, np.ndarray],
) -> np.ndarray:
    """Writes one micro-batch; returns the row of each chunk's last token."""
    count, padded = len(chunks), layout.decode_rows
    decoding = count - layout.prompts
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    ends = np.array([chunk.end for chunk in chunks], np.int32)
    sequences = np.arange(count)  # the row of each chunk in what sequences have
    sequences[decoding:] += padded - decoding
    _fill_block_tables(
        views["block_tables"], [chunk.seq.block_table for chunk in chunks], sequences
    )
    lengths = np.zeros(padded, np.int32)
    lengths[:decoding] = ends[:decoding]
    views["context_lens"][:padded] = np.maximum(lengths, 1)
    views["context_lens"][padded:] = ends[decoding:]
    if padded:
        prepare(lengths, views["decode_plan"])
    if layout.prompts:
        _running_sum(views["cu_seqlens_q"], (ends - starts)[decoding:])
    for padding in (views["input_ids"], views["positions"]):
        padding[decoding:padded] = 0
    views["slot_mapping"][decoding:padded] = PADDING_BLOCK * block_size
    # Of each token: its row, and the chunk that it belongs to.
    firsts = sequences if not layout.prompts else _first_rows(ends - starts, decoding, padded)
    owners = np.repeat(np.arange(count), ends - starts) if layout.prompts else sequences
    rows = np.arange(decoding + layout.prompt_tokens)
    rows[decoding:] += padded - decoding
    positions = starts[owners] + rows - firsts[owners]
    tables = views["block_tables"]
    slots = tables[sequences[owners], positions // block_size] * block_size + positions % block_size
    views["input_ids"][rows] = list(_token_ids(chunks))
    views["positions"][rows] = positions
    views["slot_mapping"][rows] = slots
    return firsts + (ends - starts) - 1


def _first_rows(sizes: np.ndarray, decoding: int, padded: int) -> np.ndarray:
    """The row of each chunk's first token; prompts begin behind the padding."""
    firsts = np.cumsum(sizes) - sizes
    firsts[decoding:] += padded - decoding
    return firsts


def _token_ids(chunks: list[Chunk]) -> Iterator[int]:
    """The tokens of chunks; -1 - seat for one that only the device knows so far."""
    for chunk in chunks:
        tokens, start, end = chunk.seq.token_ids, chunk.start, chunk.end
        if end - start > 1:
            yield from tokens[start:end]
            if end > len(tokens):
                yield -1 - chunk.seq.seat
        else:
            yield tokens[start] if start < len(tokens) else -1 - chunk.seq.seat


def _fill_block_tables(target: np.ndarray, tables: list[list[int]], rows: np.ndarray) -> None:
    """Writes ragged block tables into `rows` of `target`, which ascend; the rest is padding."""
    lengths = np.zeros(len(target), np.int32)
    lengths[rows] = [len(table) for table in tables]
    target.fill(PADDING_BLOCK)
    held = np.arange(target.shape[1]) < lengths[:, None]
    target[held] = np.fromiter(chain.from_iterable(tables), np.int32, int(lengths.sum()))


def _running_sum(target: np.ndarray, values: np.ndarray) -> None:
    """target[i] = sum of the first i values."""
    target[0] = 0
    np.cumsum(values, out=target[1:])
