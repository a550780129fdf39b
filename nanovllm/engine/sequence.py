"""One request on its way through the engine: its tokens, its KV blocks, and how far it has come."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.layers.logit_edits import RequestEdits
from nanovllm.logprobs import Position
from nanovllm.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
class Sequence:
    """A request, which waits, runs or has finished.

    Lengths are in tokens, times those of `time.perf_counter()`.
    """

    request_id: int  # unique in its engine, rising with arrival
    token_ids: list[int]  # the prompt, then what was generated
    params: SamplingParams
    stop_ids: frozenset[int]  # tokens that end it
    max_len: int  # length at which it ends, whatever it says
    seed: int  # of its random draws
    results: dict[int, Any] = field(default_factory=dict)  # where the engine puts its completion
    edits: RequestEdits | None = None  # what it changes of its logits
    index: int = 0  # place of its prompt in the call
    sample: int = 0  # which of the prompt's n samples it is
    # A sequence of the same prompt to be computed before, so that this finds its blocks cached.
    leader: Sequence | None = None
    detokenizer: Detokenizer | None = None  # reads its tokens as they come, if somebody asks
    # An `xgrammar.GrammarMatcher` that has been told all that was generated; None: any may follow.
    matcher: Any | None = None
    queued_time: float = field(default_factory=time.perf_counter)
    first_token_time: float | None = None  # when the host had its first token
    prompt_len: int = field(init=False)
    end_len: int = field(init=False)  # at which it ends, by `max_tokens` or `max_len`
    block_table: list[int] = field(default_factory=list)  # KV blocks it owns a share of, in order
    num_computed: int = 0  # tokens whose keys and values are cached
    num_scheduled: int = 0  # those, and the ones that steps in flight compute
    num_pending: int = 0  # tokens that steps in flight draw: their values are not known yet
    num_registered: int = 0  # leading blocks that the prefix cache knows
    request_index: int = -1  # where the device keeps its last token while it runs
    has_history: bool = False  # whether the device has its tokens, for `edits`
    # Of the generated tokens, if asked for; one more than these at the most.
    logprobs: list[Position] = field(default_factory=list)
    # Of the prompt's tokens from the second on, as far as known, if asked for.
    prompt_logprobs: list[Position] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)
        most = self.params.max_tokens
        end_len = self.max_len if most is None else min(self.prompt_len + most, self.max_len)
        self.end_len = max(end_len, self.prompt_len + 1)  # at least one token is drawn

    @property
    def length(self) -> int:
        """Its tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt, pending ones included."""
        return self.length - self.prompt_len

    @property
    def asks(self) -> bool:
        """Whether it changes logits, or wants log-probabilities."""
        params = self.params
        scored = params.logprobs is not None or params.prompt_logprobs is not None
        return scored or self.edits is not None

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are asked for and not all known."""
        asked = self.params.prompt_logprobs is not None
        return asked and len(self.prompt_logprobs) < self.prompt_len - 1

    @property
    def is_full(self) -> bool:
        """Whether it ends for its length, at the latest when its pending tokens are known."""
        return self.length >= self.end_len

    @property
    def must_wait(self) -> bool:
        """Whether its leader runs and is yet to compute what it would compute again."""
        leader = self.leader
        if leader is None or leader.request_index < 0:
            return False
        return leader.num_computed < leader.prompt_len

    def append(self, token: int) -> None:
        """Takes a generated token, and finishes the sequence if it was the last."""
        if self.first_token_time is None:
            self.first_token_time = time.perf_counter()
        self.token_ids.append(token)
        if self.matcher is not None and not self.matcher.accept_token(token):
            self.finish("error")
        else:
            self.judge()

    def finish(self, reason: str) -> None:
        """Ends it, unless a signal handler has just aborted it."""
        if self.finish_reason is None:
            self.finish_reason = reason

    def judge(self) -> None:
        """Finishes the sequence if its tokens say so."""
        if len(self.token_ids) > self.prompt_len and self.token_ids[-1] in self.stop_ids:
            self.finish("stop")
        elif self.detokenizer is not None and (reason := self.detokenizer.read(self.token_ids)):
            self.finish(reason)
        elif not self.num_pending and self.is_full:
            self.finish("length")

    def rewind(self) -> None:
        """Forgets what was computed and planned of it, but none of its tokens."""
        self.num_computed = self.num_scheduled = self.num_registered = self.num_pending = 0
        self.block_table, self.request_index, self.has_history = [], -1, False
        if self.matcher is not None:
            self.matcher.reset()
            if not all(map(self.matcher.accept_token, self.token_ids[self.prompt_len :])):
                self.finish("error")
        if self.finish_reason is None:
            self.judge()
