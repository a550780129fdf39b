"""The integers of one step, packed into one flat int32 buffer.

One buffer means one copy to the device, one broadcast to the other ranks, and, for CUDA graphs, one
static tensor whose views never move. Each field holds all micro-batches, one after the other. A
micro-batch's rows are those that decode, one token each, padding behind them, then those of
prompts. The layouts name and place the fields; `StepInputs` writes them with numpy, without a
Python loop over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heappop, heapreplace
from itertools import accumulate, chain
from typing import Any, NamedTuple

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


class RowsLayout(NamedTuple):
    """Sizes of one micro-batch."""

    decode_rows: int  # with padding
    prompts: int  # sequences of which more than one token is read
    prompt_tokens: int  # of those, together
    longest_prompt: int  # most tokens of one
    plan_size: int  # integers of the attention back end's own part

    @property
    def num_tokens(self) -> int:
        return self.decode_rows + self.prompt_tokens

    @property
    def num_seqs(self) -> int:
        return self.decode_rows + self.prompts


@dataclass(frozen=True)
class StepLayout:
    """Sizes of a step: what a rank must know to run it."""

    plan: int  # its number
    is_decode: bool  # whether it is one token of each sequence, and all are sampled
    timed: bool  # whether its works are timed, which takes a graph of its own
    num_samples: int  # rows that are sampled
    max_blocks: int  # width of the block tables
    micro_batches: tuple[RowsLayout, ...]  # at least one

    @classmethod
    def from_integers(cls, integers: Sequence[int]) -> StepLayout:
        """The inverse of `to_integers`."""
        plan, is_decode, timed, samples, max_blocks, *sizes = integers
        width = len(RowsLayout._fields)
        rows = tuple(RowsLayout(*sizes[i : i + width]) for i in range(0, len(sizes), width))
        return cls(plan, bool(is_decode), bool(timed), samples, max_blocks, rows)

    def to_integers(self) -> list[int]:
        """For the other ranks."""
        flags = int(self.is_decode), int(self.timed)
        sizes = chain.from_iterable(self.micro_batches)
        return [self.plan, *flags, self.num_samples, self.max_blocks, *sizes]

    @cached_property
    def num_seqs(self) -> int:
        return sum(rows.num_seqs for rows in self.micro_batches)

    @cached_property
    def counts(self) -> dict[str, list[int]]:
        """How much of each field every micro-batch has."""
        tokens = [rows.num_tokens for rows in self.micro_batches]
        seqs = [rows.num_seqs for rows in self.micro_batches]
        return {
            "input_ids": tokens,
            "positions": tokens,
            "slot_mapping": tokens,
            "context_lens": seqs,
            "block_tables": seqs,
            "plans": [rows.plan_size for rows in self.micro_batches],
            "cu_seqlens_q": [rows.prompts + bool(rows.prompts) for rows in self.micro_batches],
        }

    @cached_property
    def places(self) -> dict[str, slice]:
        """Where each field is."""
        sizes = {name: sum(counts) for name, counts in self.counts.items()}
        sizes["block_tables"] *= self.max_blocks
        if not self.is_decode or len(self.micro_batches) > 1:  # else it is all rows in order
            sizes["sample_rows"] = self.num_samples
        ends = list(accumulate(sizes.values(), initial=0))
        return dict(zip(sizes, map(slice, ends, ends[1:]), strict=True))

    @cached_property
    def size(self) -> int:
        """Integers in the flat buffer."""
        return max(place.stop for place in self.places.values())

    def views(self, flat: Any) -> dict[str, Any]:
        """The fields of a flat numpy array or tensor, as views into it."""
        fields = {name: flat[place] for name, place in self.places.items()}
        fields["block_tables"] = fields["block_tables"].reshape(self.num_seqs, self.max_blocks)
        return fields


def micro_batches(
    layout: StepLayout, flat: torch.Tensor, last_tokens: torch.Tensor, workspace: Any
) -> tuple[list[MicroBatch], torch.Tensor | None]:
    """The micro-batches of a step, and the rows of all of them together that are sampled.

    Both are views into `flat`; the rows are int32 [num_samples], or None: all, in order.

    Args:
        layout: of `flat`.
        flat: int32, on the device. An input id below 0 stands for a token that the host does not
            know yet: -1 - i is `last_tokens[i]`.
        last_tokens: int64 [max_num_seqs], on the device.
        workspace: of decode attention.
    """
    fields = layout.views(flat)
    fields["input_ids"] = kernels.resolve_tokens(fields["input_ids"], last_tokens)
    parts = {name: fields[name].split(counts) for name, counts in layout.counts.items()}
    batches: list[MicroBatch] = []
    for index, rows in enumerate(layout.micro_batches):
        own = {name: part[index] for name, part in parts.items()}
        tables, lengths, count = own["block_tables"], own["context_lens"], rows.decode_rows
        decode = prefill = None
        if count:
            decode = DecodeMetadata(tables[:count], lengths[:count], own["plans"], workspace)
        if rows.prompts:
            prefill = PrefillMetadata(
                tables[count:], lengths[count:], own["cu_seqlens_q"], rows.longest_prompt
            )
        metadata = AttentionMetadata(own["slot_mapping"], decode, prefill)
        inputs = StepTensors(own["input_ids"], own["positions"], metadata)
        first = sum(len(batch.inputs.input_ids) for batch in batches)
        batches.append(MicroBatch(index, inputs, first))
    return batches, fields.get("sample_rows")


def dummy_chunk(start: int, end: int, blocks: Sequence[int] = ()) -> Chunk:
    """Tokens of a sequence that nobody asked for, in the padding block but for `blocks`."""
    seq = EngineSequence(
        -1, [0] * end, SamplingParams(), frozenset(), end, 0, block_table=list(blocks)
    )
    return Chunk(seq, start, end, needs_sample=True)


# Stands in rows of decode that no sequence needs: it has no context, and its token is 0,
# as -1 is the last place of a list with one.
PADDING = Chunk(dummy_chunk(0, 1).seq, start=-1, end=0, needs_sample=False)


def decode_first(chunks: Sequence[Chunk]) -> list[int]:
    """Numbers of the chunks in the order of a micro-batch: those of one token, then the others."""
    return sorted(range(len(chunks)), key=lambda i: chunks[i].end - chunks[i].start > 1)


def balance(context_lens: Sequence[int], layout: StepLayout) -> Sequence[Sequence[int]]:
    """Deals sequences that decode out to micro-batches, the same number of context tokens to each.

    Long sequences choose first, and each goes where the fewest tokens are so far (the LPT rule of
    scheduling, Graham, 1969), as long as there is a row left. Returns the numbers of each
    micro-batch's sequences.
    """
    if len(layout.micro_batches) == 1:
        return [range(len(context_lens))]
    parts: list[list[int]] = [[] for _ in layout.micro_batches]
    least = [(0, batch) for batch in range(len(parts))]  # a heap
    for number in sorted(range(len(context_lens)), key=context_lens.__getitem__, reverse=True):
        tokens, batch = least[0]
        part = parts[batch]
        part.append(number)
        if len(part) < layout.micro_batches[batch].num_seqs:
            heapreplace(least, (tokens + context_lens[number], batch))
        else:
            heappop(least)
    return parts


class StepInputs:
    """Lays the inputs of steps out, and fills them; `max_blocks` is the width of block tables."""

    def __init__(self, block_size: int, max_blocks: int, backend: AttentionBackend) -> None:
        self.block_size = block_size
        self.max_blocks = max_blocks
        self.backend = backend
        self.columns = np.arange(max_blocks, dtype=np.int32)

    def decode_layout(
        self, plan: int, size: int, micro_batches: int, *, timed: bool = False
    ) -> StepLayout:
        """A decode step of `size` rows, as evenly as may be in so many micro-batches."""
        counts = [size // micro_batches + (i < size % micro_batches) for i in range(micro_batches)]
        rows = tuple(self._rows(count, []) for count in counts)
        return StepLayout(plan, True, timed, size, self.max_blocks, rows)

    def mixed_layout(self, plan: int, parts: Sequence[Sequence[Chunk]]) -> StepLayout:
        """A step of any chunks, those of each micro-batch in the order of `decode_first`."""
        sizes = [[chunk.end - chunk.start for chunk in chunks] for chunks in parts]
        rows = tuple(self._rows(part.count(1), [n for n in part if n > 1]) for part in sizes)
        samples = sum(chunk.needs_sample for chunks in parts for chunk in chunks)
        return StepLayout(plan, False, False, samples, self.max_blocks, rows)

    def fill(
        self,
        layout: StepLayout,
        chunks: Sequence[Chunk],
        parts: Sequence[Sequence[int]],
        flat: np.ndarray,
    ) -> None:
        """Writes the fields of a step to `flat`, int32 [layout.size].

        `parts` are the numbers of the chunks in each micro-batch, those of one token first. In
        decode, rows that are left are padding, which is no work for attention.
        """
        views = layout.views(flat)
        chunks = [*chunks, PADDING]
        order: list[int] = []  # of the chunks, padding included
        for count, part in zip(layout.counts["context_lens"], parts, strict=True):
            order += [*part, *[len(chunks) - 1] * (count - len(part))]
        own = [chunks[i] for i in order]
        lengths = np.fromiter((chunk.end for chunk in own), np.int32)
        ends = np.maximum(lengths, 1)
        if layout.is_decode:
            firsts = np.arange(len(own) + 1)
            seqs, positions = firsts[:-1], ends - 1
            views["input_ids"][:] = np.fromiter(map(_token, own), np.int32)
        else:
            starts = np.fromiter((chunk.start for chunk in own), np.int32)
            firsts = np.append(0, ends - starts).cumsum()
            seqs = np.repeat(np.arange(len(own)), ends - starts)
            positions = np.arange(len(seqs)) + (starts - firsts[:-1])[seqs]
            views["input_ids"][:] = np.fromiter(chain.from_iterable(map(_tokens, own)), np.int32)
        tables = views["block_tables"]
        owned = [chunk.seq.block_table for chunk in own]
        counts = np.fromiter(map(len, owned), np.int32)
        tables.fill(PADDING_BLOCK)
        tables[self.columns < counts[:, None]] = np.fromiter(chain.from_iterable(owned), np.int32)
        indices = positions // self.block_size
        # As block * block_size + position % block_size.
        views["slot_mapping"][:] = (tables[seqs, indices] - indices) * self.block_size + positions
        views["positions"][:] = positions
        views["context_lens"][:] = ends
        self._fill_attention(layout, lengths, firsts, views)
        if "sample_rows" in views:
            by_chunk = np.empty(len(chunks), np.int32)
            by_chunk[order] = firsts[1:] - 1
            sampled = by_chunk[:-1]
            if not layout.is_decode:
                sampled = by_chunk[[chunk.needs_sample for chunk in chunks]]
            views["sample_rows"][: len(sampled)] = sampled
            views["sample_rows"][len(sampled) :] = 0

    def _rows(self, decode_rows: int, prompts: list[int]) -> RowsLayout:
        plan_size = self.backend.plan_size(decode_rows) if decode_rows else 0
        longest = max(prompts, default=0)
        return RowsLayout(decode_rows, len(prompts), sum(prompts), longest, plan_size)

    def _fill_attention(
        self, layout: StepLayout, lengths: np.ndarray, firsts: np.ndarray, views: dict[str, Any]
    ) -> None:
        """Writes what attention alone reads; `firsts` are the first tokens of all sequences."""
        plans, starts = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
        first = 0
        for rows in layout.micro_batches:
            prompts = first + rows.decode_rows
            if rows.decode_rows:
                plans.append(self.backend.plan(lengths[first:prompts]))
            first += rows.num_seqs
            if rows.prompts:
                starts.append(firsts[prompts : first + 1] - firsts[prompts])
        np.concatenate(plans, out=views["plans"])
        if not layout.is_decode:
            np.concatenate(starts, out=views["cu_seqlens_q"], casting="same_kind")


def _token(chunk: Chunk) -> int:
    """The token of a chunk of one, or -1 - request_index if only the device knows it so far."""
    tokens = chunk.seq.token_ids
    return tokens[chunk.start] if chunk.start < len(tokens) else -1 - chunk.seq.request_index


def _tokens(chunk: Chunk) -> list[int]:
    """The tokens of a chunk, of which the last may be known on the device only."""
    seq, start, end = chunk.seq, chunk.start, chunk.end
    known = seq.token_ids[start:end]
    return known if len(known) == end - start else [*known, -1 - seq.request_index]
