"""The KV cache as a pool of blocks, shared between sequences that begin alike.

A block holds the keys and values of `block_size` tokens. A block that is full and computed is
registered under a hash of its tokens and of everything before them; a new sequence takes over the
registered blocks that match its own beginning. Blocks that no sequence owns keep their contents
until they are needed, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import xxhash

from nanovllm.engine.sequence import Sequence

# Block 0 of the cache belongs to no sequence: the padding rows of captured graphs write there.
PADDING_BLOCK = 0
NO_PREFIX = 0


@dataclass(slots=True)
class Block:
    """A block: its owners, and what the prefix cache knows of it (`chain_hash` None: nothing)."""

    owners: int = 0
    chain_hash: int | None = None
    prefix_hash: int = NO_PREFIX
    tokens: tuple[int, ...] = ()


def hash_block(prefix_hash: int, tokens: tuple[int, ...]) -> int:
    """64-bit hash of a block's tokens and, through `prefix_hash`, of all before them."""
    hasher = xxhash.xxh64(seed=prefix_hash)
    hasher.update(np.asarray(tokens, dtype=np.int64).tobytes())
    return hasher.intdigest()


class BlockManager:
    """Owns the numbers of blocks 1 to `num_blocks`; the memory itself is the runner's."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.blocks = {i: Block() for i in range(PADDING_BLOCK + 1, PADDING_BLOCK + 1 + num_blocks)}
        # Blocks without owners, the longest unused first.
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(self.blocks)
        self.by_hash: dict[int, int] = {}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill or begin."""
        return -(-num_tokens // self.block_size)

    def admit(self, seq: Sequence, reserve: int = 0) -> bool:
        """Gives a sequence blocks for all its tokens, cached ones where its beginning is known.

        Sets `num_computed` to the tokens found in the cache, at most all but one: the last must be
        run for its logits. Does nothing and returns False if fewer than `reserve` blocks would
        stay free.
        """
        cached = self._cached_prefix(seq.token_ids) if self.enable_prefix_caching else []
        fresh = self.blocks_for(len(seq.token_ids)) - len(cached)
        revived = sum(block_id in self.free for block_id in cached)
        if fresh + revived + reserve > len(self.free):
            return False
        for block_id in cached:
            self.free.pop(block_id, None)
            self.blocks[block_id].owners += 1
        seq.block_table = cached + [self._take() for _ in range(fresh)]
        seq.num_computed = len(cached) * self.block_size
        seq.num_registered = len(cached)
        return True

    def extend(self, seq: Sequence) -> bool:
        """Makes room for one more token; returns False if that takes a block and none is free."""
        if self.blocks_for(seq.num_computed + 1) > len(seq.block_table):
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
        while seq.num_registered < seq.num_computed // self.block_size:
            index = seq.num_registered
            tokens = self._tokens_of(seq.token_ids, index)
            prefix = self._chain_hash(seq, index)
            chain_hash = hash_block(prefix, tokens)
            block = self.blocks[seq.block_table[index]]
            block.chain_hash, block.prefix_hash, block.tokens = chain_hash, prefix, tokens
            # Of equal blocks, the first stays the one to be found.
            self.by_hash.setdefault(chain_hash, seq.block_table[index])
            seq.num_registered += 1

    def release(self, seq: Sequence) -> None:
        """Takes back all blocks of `seq`; what they hold stays in the prefix cache for now."""
        # The end of a sequence is the least likely to be shared, so it is to be reused first.
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.owners -= 1
            if block.owners == 0:
                self.free[block_id] = None
        seq.block_table = []
        seq.num_computed = seq.num_registered = 0

    def _tokens_of(self, token_ids: list[int], index: int) -> tuple[int, ...]:
        return tuple(token_ids[index * self.block_size : (index + 1) * self.block_size])

    def _chain_hash(self, seq: Sequence, index: int) -> int:
        """Hash of everything before block `index` of `seq`."""
        if index == 0:
            return NO_PREFIX
        chain_hash = self.blocks[seq.block_table[index - 1]].chain_hash
        assert chain_hash is not None  # blocks are registered in order
        return chain_hash

    def _cached_prefix(self, token_ids: list[int]) -> list[int]:
        """The registered blocks that begin `token_ids`, but never one with its last token."""
        found: list[int] = []
        prefix = NO_PREFIX
        for index in range((len(token_ids) - 1) // self.block_size):
            tokens = self._tokens_of(token_ids, index)
            chain_hash = hash_block(prefix, tokens)
            block_id = self.by_hash.get(chain_hash)
            if block_id is None:
                break
            block = self.blocks[block_id]
            # A hash may collide; the contents decide.
            if block.tokens != tokens or block.prefix_hash != prefix:
                break
            found.append(block_id)
            prefix = chain_hash
        return found

    def _take(self) -> int:
        """Removes the longest unused block from the free list, forgetting what it held."""
        block_id, _ = self.free.popitem(last=False)
        block = self.blocks[block_id]
        if block.chain_hash is not None and self.by_hash.get(block.chain_hash) == block_id:
            del self.by_hash[block.chain_hash]
        self.blocks[block_id] = Block(owners=1)
        return block_id
