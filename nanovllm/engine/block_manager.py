"""The KV cache as a pool of blocks, shared between sequences that begin alike.

A block holds the keys and values of `block_size` tokens. A block that is full and computed is
registered under a hash of its tokens and of everything before them; a new sequence takes over the
registered blocks that match its own beginning. Hashes may collide, so what a block holds is known
by a number as well, which no other contents ever get. Blocks that no sequence owns keep their
contents until they are needed, the longest unused first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from itertools import count

import numpy as np
import xxhash

from nanovllm.engine.sequence import Sequence

# Block 0 of the cache belongs to no sequence: the padding rows of captured graphs write there.
PADDING_BLOCK = 0


@dataclass(frozen=True, slots=True)
class PrefixNode:
    """What a registered block holds: `tokens`, after those of the node with the id `parent`.

    There may be one for every block of the cache, hence `tokens` as bytes of int32: 4 bytes each,
    where a tuple and its integers take 36.
    """

    node_id: int
    parent: int
    tokens: bytes
    chain_hash: int


ROOT = PrefixNode(node_id=0, parent=0, tokens=b"", chain_hash=0)


@dataclass(slots=True)
class Block:
    """A block: how many sequences own it, and what the prefix cache knows of it."""

    ref_count: int = 0
    node: PrefixNode | None = None


def hash_block(prefix_hash: int, tokens: bytes) -> int:
    """64-bit hash of a block's tokens and, through `prefix_hash`, of all before them."""
    return xxhash.xxh64_intdigest(tokens, seed=prefix_hash)


class BlockManager:
    """Owns the numbers of blocks 1 to `num_blocks`; the memory itself is the runner's."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.node_ids = count(ROOT.node_id + 1)
        self.blocks = {i: Block() for i in range(PADDING_BLOCK + 1, PADDING_BLOCK + 1 + num_blocks)}
        self.reset()

    def reset(self) -> None:
        """Takes back all blocks, whoever owns them; the prefix cache keeps what it knows."""
        self.by_hash: dict[int, int] = {}
        for block_id, block in self.blocks.items():
            block.ref_count = 0
            if block.node is not None:
                self.by_hash.setdefault(block.node.chain_hash, block_id)
        # Blocks that nobody owns, the longest unused first.
        by_use = sorted(self.blocks, key=lambda block_id: self.blocks[block_id].node is not None)
        self.free: OrderedDict[int, None] = OrderedDict.fromkeys(by_use)

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
            self.blocks[block_id].ref_count += 1
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
        while seq.num_registered < seq.num_computed // self.block_size:
            index = seq.num_registered
            parent = self.blocks[seq.block_table[index - 1]].node if index else ROOT
            assert parent is not None  # blocks are registered in order
            tokens = self._tokens_of(seq.token_ids, index)
            chain_hash = hash_block(parent.chain_hash, tokens)
            # Of equal blocks, the first stays the one to be found.
            found = self.by_hash.setdefault(chain_hash, seq.block_table[index])
            node = self._node_if(found, parent, tokens)
            self.blocks[seq.block_table[index]].node = node or PrefixNode(
                next(self.node_ids), parent.node_id, tokens, chain_hash
            )
            seq.num_registered += 1

    def release(self, seq: Sequence) -> None:
        """Takes back all blocks of `seq`; what they hold stays in the prefix cache for now."""
        # The end of a sequence is the least likely to be shared, so it is to be reused first.
        for block_id in reversed(seq.block_table):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                self.free[block_id] = None
        seq.block_table = []
        seq.num_computed = seq.num_scheduled = seq.num_registered = 0

    def _tokens_of(self, token_ids: list[int], index: int) -> bytes:
        tokens = token_ids[index * self.block_size : (index + 1) * self.block_size]
        return np.array(tokens, np.int32).tobytes()

    def _node_if(self, block_id: int, parent: PrefixNode, tokens: bytes) -> PrefixNode | None:
        """The node of a block if it is `tokens` after `parent`; a hash alone proves nothing."""
        node = self.blocks[block_id].node
        same = node is not None and (node.parent, node.tokens) == (parent.node_id, tokens)
        return node if same else None

    def _cached_prefix(self, token_ids: list[int]) -> list[int]:
        """The registered blocks that begin `token_ids`, but never one with its last token."""
        found: list[int] = []
        parent = ROOT
        for index in range((len(token_ids) - 1) // self.block_size):
            tokens = self._tokens_of(token_ids, index)
            block_id = self.by_hash.get(hash_block(parent.chain_hash, tokens))
            node = None if block_id is None else self._node_if(block_id, parent, tokens)
            if block_id is None or node is None:
                break
            found.append(block_id)
            parent = node
        return found

    def _take(self) -> int:
        """Removes the longest unused block from the free list, forgetting what it held."""
        block_id, _ = self.free.popitem(last=False)
        node = self.blocks[block_id].node
        if node is not None and self.by_hash.get(node.chain_hash) == block_id:
            del self.by_hash[node.chain_hash]
        self.blocks[block_id] = Block(ref_count=1)
        return block_id
