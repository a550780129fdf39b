"""The KV cache as a pool of blocks, shared between sequences that begin alike.

A block holds the keys and values of `block_size` tokens. Once it is full and computed, it is
registered under its tokens and all before them, and a new sequence takes over the registered blocks
that match its own beginning. Registered blocks that no sequence owns keep their contents until no
other is free, and the least recently used is taken first.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from itertools import count
from typing import NamedTuple

from nanovllm.engine.sequence import Sequence

# Block 0 of the cache belongs to no sequence: the padding rows of captured graphs write there.
PADDING_BLOCK = 0
# The prefix that has no tokens.
ROOT = 0

# The number of the prefix before a block, and the block's tokens as bytes of int32, which take a
# ninth of what a tuple of them does.
Key = tuple[int, bytes]


class Prefix(NamedTuple):
    """All tokens up to a block's end: `number` stands for them, and never for any others."""

    number: int
    key: Key


class BlockManager:
    """Owns the numbers of blocks 1 to `num_blocks`; the memory itself is the runner's."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.prefixes: dict[int, Prefix] = {}  # what the registered blocks hold
        self.new_numbers = count(ROOT + 1)
        self.reset()

    def reset(self) -> None:
        """Takes back all blocks, whoever owns them; the prefix cache keeps what it knows."""
        block_ids = range(PADDING_BLOCK + 1, PADDING_BLOCK + 1 + self.num_blocks)
        self.ref_counts = dict.fromkeys(block_ids, 0)  # sequences that own each block
        self.by_key: dict[Key, int] = {}  # of blocks that hold the same, the one to be found
        for block_id, prefix in self.prefixes.items():
            self.by_key.setdefault(prefix.key, block_id)
        by_use = sorted(block_ids, key=self.prefixes.__contains__)
        # Nobody owns these: first those that hold no known prefix, then the least recently used.
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(by_use)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence, reserve: int = 0) -> bool:
        """Gives a sequence blocks for all its tokens, cached ones where its beginning is known.

        Sets `num_computed` to the tokens found in the cache, at most all but one: the last must be
        run for its logits; none if those of the whole prompt are needed. Does nothing and returns
        False if fewer than `reserve` blocks would stay free.
        """
        may_share = self.enable_prefix_caching and not seq.scores_prompt
        cached = self._cached_prefix(seq.token_ids) if may_share else []
        fresh = self.blocks_for(len(seq.token_ids)) - len(cached)
        revived = sum(block_id in self.free for block_id in cached)
        if fresh + revived + reserve > len(self.free):
            return False
        for block_id in cached:
            self.free.pop(block_id, None)
            self.ref_counts[block_id] += 1
        seq.block_table = cached + [self._take() for _ in range(fresh)]
        seq.num_computed = seq.num_scheduled = len(cached) * self.block_size
        seq.num_registered = len(cached)
        return True

    def extend(self, seq: Sequence) -> bool:
        """Makes room for one more token; returns False if that takes a block and none is free."""
        if seq.num_scheduled >= len(seq.block_table) * self.block_size:
            if not self.free:
                return False
            seq.block_table.append(self._take())
        return True

    def register(self, seq: Sequence) -> None:
        """Makes the blocks that `seq` has filled since the last call known to the prefix cache.

        To be called once the tokens up to `num_computed` are known and their computation has been
        issued.
        """
        if not self.enable_prefix_caching:
            return
        for index in range(seq.num_registered, seq.num_computed // self.block_size):
            before = self.prefixes[seq.block_table[index - 1]].number if index else ROOT
            key = before, self._tokens_of(seq.token_ids, index)
            found = self.by_key.setdefault(key, seq.block_table[index])
            known = self.prefixes.get(found) or Prefix(next(self.new_numbers), key)
            self.prefixes[seq.block_table[index]] = known
            seq.num_registered += 1

    def release(self, seq: Sequence) -> None:
        """Takes back all blocks of `seq`; what they hold stays in the prefix cache for now."""
        # The end of a sequence is the least likely to be shared, so it is to be reused first.
        for block_id in reversed(seq.block_table):
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self.free[block_id] = None
                # What nobody can find again comes first: so prefixes stay longer, and no more
                # memory is written than requests need.
                if block_id not in self.prefixes:
                    self.free.move_to_end(block_id, last=False)
        seq.block_table = []
        seq.num_computed = seq.num_scheduled = seq.num_registered = 0

    def _tokens_of(self, token_ids: list[int], index: int) -> bytes:
        tokens = token_ids[index * self.block_size : (index + 1) * self.block_size]
        return struct.pack(f"{len(tokens)}i", *tokens)  # three times as fast as numpy

    def _cached_prefix(self, token_ids: list[int]) -> list[int]:
        """The registered blocks that begin `token_ids`, but never one with its last token."""
        found: list[int] = []
        before = ROOT
        for index in range((len(token_ids) - 1) // self.block_size):
            block_id = self.by_key.get((before, self._tokens_of(token_ids, index)))
            if block_id is None:
                break
            found.append(block_id)
            before = self.prefixes[block_id].number
        return found

    def _take(self) -> int:
        """Removes the first block from the free list, forgetting what it held."""
        block_id, _ = self.free.popitem(last=False)
        prefix = self.prefixes.pop(block_id, None)
        if prefix is not None and self.by_key.get(prefix.key) == block_id:
            del self.by_key[prefix.key]
        self.ref_counts[block_id] = 1
        return block_id
