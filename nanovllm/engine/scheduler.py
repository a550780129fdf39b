"""Chooses what the next step computes: continuous batching with chunked prefill.

It knows requests and KV blocks, and nothing of stages and lanes: pipeline_scheduler.py issues a
step's stages.

A step is either prefill (up to `max_num_batched_tokens` prompt tokens of several sequences, long
prompts in chunks) or decode (one token for every sequence that has read all but its last token).
Prefill goes first, since it widens the decode batch, but never more than a few steps in a row.

Sequences run in order of arrival. When KV blocks run out, the youngest is preempted: it loses its
blocks and waits, at the head of the queue, to be computed again. The oldest therefore always
advances, and since no sequence may grow beyond all blocks together, it always ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence

MAX_PREFILL_STREAK = 8
# While others run, this share of all blocks stays free on admission, so that a sequence is not
# admitted only to be preempted in the next step.
ADMISSION_RESERVE = 0.01


@dataclass(slots=True)
class Chunk:
    """The part of a sequence that a step computes: tokens `start` to `end`.

    `needs_sample` says whether that reads the sequence to its end, so that its next token is drawn.
    Not frozen, which would take three times as long to make.
    """

    seq: Sequence
    start: int
    end: int
    needs_sample: bool


@dataclass(frozen=True)
class Step:
    """What one forward pass computes; in decode every chunk is one token.

    `asks`: whether a running sequence asks for more than a draw.
    """

    is_decode: bool
    chunks: list[Chunk]
    asks: bool = False


class Scheduler:
    """Owns the queues; a sequence is waiting, running or finished, and in at most one of them."""

    def __init__(
        self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_preemptions = 0
        self.restart(())

    @property
    def is_idle(self) -> bool:
        return not self.waiting and not self.running

    def add(self, seq: Sequence) -> None:
        """Queues a sequence whose prompt fits in all blocks together."""
        self.waiting.append(seq)

    def add_computed(self, seq: Sequence) -> bool:
        """Runs a sequence as if all its tokens but the last were computed; False: has no room."""
        if len(self.running) >= self.max_num_seqs or not self.blocks.admit(seq):
            return False
        self._start(seq)
        seq.num_computed = seq.num_scheduled = len(seq.token_ids) - 1
        return True

    def restart(self, seqs: Iterable[Sequence]) -> None:
        """Begins anew with the unfinished ones of these sequences, in order of arrival.

        All that a sequence needs to go on is its tokens, so this mends whatever an error or an
        interrupt in any other method left half done.
        """
        self.blocks.reset()
        self.running: list[Sequence] = []
        self.num_asking = 0  # of these, those that ask for more than a token
        self.free_indices = list(range(self.max_num_seqs))
        self.prefill_streak = 0
        self.waiting: deque[Sequence] = deque()
        for seq in seqs:
            seq.rewind()
            if seq.finish_reason is None:
                self.waiting.append(seq)

    def abort(self, seq: Sequence) -> None:
        """Ends a waiting or running sequence at once."""
        if seq in self.running:
            self._leave(seq)
        elif seq in self.waiting:
            self.waiting.remove(seq)
        seq.finish_reason = "abort"

    def schedule(self, *, ahead: bool = False) -> Step | None:
        """Plans the next step; None if nothing is left to do.

        With `ahead` it is planned before `update` has the tokens of the last step: sequences go on
        as if these would not end them, and none is preempted. Those with a matcher, which needs the
        tokens, are left out. None then means that the last step has to be updated first.
        """
        prefilling, decodable = self._split_running()
        if self.prefill_streak < MAX_PREFILL_STREAK or not decodable:
            chunks = self._prefill_chunks(prefilling)
            if chunks:
                self.prefill_streak += 1
                return self._mark_scheduled(False, chunks)
        chunks = self._decode_chunks(decodable, may_preempt=not ahead)
        if chunks:
            self.prefill_streak = 0
            return self._mark_scheduled(True, chunks)
        if ahead or self.is_idle:
            return None
        # All that could decode gave way to older ones that still read their prompts.
        prefilling, _ = self._split_running()
        chunks = self._prefill_chunks(prefilling)
        assert chunks, "requests are left, but none of them can run"
        return self._mark_scheduled(False, chunks)

    def update(self, step: Step, tokens: list[int]) -> list[Sequence]:
        """Takes the tokens drawn by `step`, one per sampling chunk; returns what has finished.

        A token below 0 says that its logits were not numbers.
        """
        finished: list[Sequence] = []
        drawn = iter(tokens)
        for chunk in step.chunks:
            token = next(drawn) if chunk.needs_sample else None
            seq = chunk.seq
            if seq.finish_reason is not None:
                continue  # aborted while the step ran, or computed ahead in vain
            seq.num_computed = chunk.end
            self.blocks.register(seq)
            if token is not None:
                seq.num_pending -= 1
                if token < 0:
                    seq.finish("error")
                else:
                    seq.append(token)
                if seq.finish_reason is not None:
                    self._leave(seq)
                    finished.append(seq)
        return finished

    def _mark_scheduled(self, is_decode: bool, chunks: list[Chunk]) -> Step:
        for chunk in chunks:
            chunk.seq.num_scheduled = chunk.end
            chunk.seq.num_pending += chunk.needs_sample
        return Step(is_decode, chunks, asks=self.num_asking > 0)

    def _split_running(self) -> tuple[list[Sequence], list[Sequence]]:
        """The running sequences that still read their prompt, and those that can decode.

        Those that end with a token that is pending are neither, nor are those that wait for it.
        """
        prefilling: list[Sequence] = []
        decodable: list[Sequence] = []
        for seq in self.running:
            length = seq.length
            if length - seq.num_scheduled > 1:
                prefilling.append(seq)
            elif length < seq.end_len and (seq.matcher is None or not seq.num_pending):
                decodable.append(seq)
        return prefilling, decodable

    def _prefill_chunks(self, prefilling: list[Sequence]) -> list[Chunk]:
        """Chunks of sequences that still read their prompt, then of newly admitted ones."""
        chunks: list[Chunk] = []
        budget, following = self.max_num_batched_tokens, iter(prefilling)
        while budget and (seq := next(following, None) or self._admit_next()):
            start = seq.num_scheduled
            end = min(seq.length, start + budget)
            chunks.append(Chunk(seq, start, end, needs_sample=end == seq.length))
            budget -= end - start
        return chunks

    def _admit_next(self) -> Sequence | None:
        """Lets the first waiting sequence run, if there is room and there are blocks for it."""
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return None
        if self.waiting[0].must_wait:
            return None
        reserve = int(self.blocks.num_blocks * ADMISSION_RESERVE) + 1 if self.running else 0
        if not self.blocks.admit(self.waiting[0], reserve):
            return None
        return self._start(self.waiting.popleft())

    def _start(self, seq: Sequence) -> Sequence:
        """Lets a sequence run that has its blocks."""
        seq.request_index = self.free_indices.pop()
        self.running.append(seq)
        self.num_asking += seq.asks
        return seq

    def _decode_chunks(self, decodable: list[Sequence], *, may_preempt: bool) -> list[Chunk]:
        """One token for each, the oldest first; none if one lacks a block and none may go."""
        chunks: list[Chunk] = []
        for seq in decodable:
            if seq.request_index < 0:
                break  # preempted, as are all after it
            while not self.blocks.extend(seq):
                if not may_preempt:
                    return []
                self._preempt(self.running[-1])
                if seq.request_index < 0:
                    break  # it was the youngest itself
            else:
                start = seq.num_scheduled
                chunks.append(Chunk(seq, start, start + 1, needs_sample=True))
        return chunks

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _leave(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.num_asking -= seq.asks
        self.free_indices.append(seq.request_index)
        seq.request_index, seq.has_history = -1, False
        self.blocks.release(seq)
        seq.num_pending = 0
