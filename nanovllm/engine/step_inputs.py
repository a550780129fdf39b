"""The integers of one step, packed into one flat int32 buffer.

One buffer means one copy to the device, one broadcast to the other ranks, and, for CUDA graphs, one
static tensor whose views never move. `InputLayout` names and places the fields; `fill_inputs`
writes them from the scheduler's step with numpy, without a Python loop over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from nanovllm.engine.block_manager import PADDING_BLOCK
from nanovllm.engine.scheduler import Chunk
from nanovllm.layers.attention import DecodeMetadata, PrefillMetadata


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
    """

    is_decode: bool
    num_tokens: int
    num_seqs: int
    num_samples: int
    max_blocks: int
    max_seqlen_q: int

    @classmethod
    def decode(cls, num_seqs: int, max_blocks: int) -> InputLayout:
        """Layout of a decode step of `num_seqs` sequences."""
        return cls(True, num_seqs, num_seqs, num_seqs, max_blocks, 1)

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
            fields["sample_rows"] = (self.num_samples,)
        return fields

    @property
    def size(self) -> int:
        """Integers in the flat buffer."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())

    def views(self, flat: Any) -> dict[str, Any]:
        """The fields of a flat numpy array or tensor, as views into it."""
        views, start = {}, 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            views[name] = flat[start : start + size].reshape(shape)
            start += size
        return views


@dataclass(frozen=True)
class StepTensors:
    """What the model is called with: T tokens of N sequences, S of which sample.

    Attributes:
        input_ids, positions: int32 [T].
        metadata: of attention.
        sample_rows: int32 [S], tokens whose logits are wanted; None: all.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: DecodeMetadata | PrefillMetadata
    sample_rows: torch.Tensor | None

    @classmethod
    def of(cls, layout: InputLayout, flat: torch.Tensor, workspace: Any) -> StepTensors:
        """Views into `flat`, a device tensor laid out as `layout`."""
        views = layout.views(flat)
        places = (views["slot_mapping"], views["block_tables"], views["context_lens"])
        metadata: DecodeMetadata | PrefillMetadata
        if layout.is_decode:
            metadata = DecodeMetadata(*places, views["tile_offsets"], workspace)
        else:
            metadata = PrefillMetadata(*places, views["cu_seqlens_q"], layout.max_seqlen_q)
        return cls(views["input_ids"], views["positions"], metadata, views.get("sample_rows"))


def fill_inputs(
    layout: InputLayout, chunks: list[Chunk], block_size: int, tile_size: int, flat: np.ndarray
) -> None:
    """Writes the fields of `chunks` into `flat`, int32 [layout.size].

    `tile_size` is the attention back end's. Decode rows beyond the chunks are padding: one token
    of context, in the padding block.
    """
    views = layout.views(flat)
    _fill_block_tables(views["block_tables"], [chunk.seq.block_table for chunk in chunks])
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    ends = np.array([chunk.end for chunk in chunks], np.int32)
    count = len(chunks)
    views["context_lens"][:count] = ends
    views["context_lens"][count:] = 1
    if layout.is_decode:
        tokens = [chunk.seq.token_ids[chunk.start] for chunk in chunks]
        positions, rows = starts, np.arange(count)
        _running_sum(views["tile_offsets"], -(-views["context_lens"] // tile_size))
    else:
        tokens = list(
            chain.from_iterable(chunk.seq.token_ids[chunk.start : chunk.end] for chunk in chunks)
        )
        sizes = ends - starts
        _running_sum(views["cu_seqlens_q"], sizes)
        rows = np.repeat(np.arange(count), sizes)
        firsts = views["cu_seqlens_q"][:-1]
        positions = np.arange(layout.num_tokens, dtype=np.int32) + (starts - firsts)[rows]
        views["sample_rows"][:] = (firsts + sizes - 1)[[chunk.samples for chunk in chunks]]
    blocks = views["block_tables"][rows, positions // block_size]
    slots = blocks * block_size + positions % block_size
    for name, values in (("input_ids", tokens), ("positions", positions), ("slot_mapping", slots)):
        views[name][: len(values)] = values
        views[name][len(values) :] = PADDING_BLOCK * block_size


def _fill_block_tables(target: np.ndarray, tables: list[list[int]]) -> None:
    """Writes ragged block tables into the first rows of `target`; the rest is padding."""
    lengths = np.zeros(len(target), np.int32)
    lengths[: len(tables)] = [len(table) for table in tables]
    target.fill(PADDING_BLOCK)
    held = np.arange(target.shape[1]) < lengths[:, None]
    target[held] = np.fromiter(chain.from_iterable(tables), np.int32, int(lengths.sum()))


def _running_sum(target: np.ndarray, values: np.ndarray) -> None:
    """target[i] = sum of the first i values."""
    target[0] = 0
    np.cumsum(values, out=target[1:])
