"""One request on its way through the engine: its tokens, its KV blocks, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from nanovllm.sampling_params import SamplingParams


class Status(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Sequence:
    """A request.

    Attributes:
        request_id: unique in its engine, rising with arrival.
        token_ids: the prompt, then what was generated.
        prompt_len: tokens of the prompt.
        params: sampling options.
        stop_ids: tokens that end it.
        max_len: length in tokens at which it ends, whatever it says.
        seed: of its random draws.
        block_table: ids of the KV blocks it owns a share of, in order.
        num_computed: tokens whose keys and values are cached.
        num_registered: leading blocks that the prefix cache knows.
        finish_reason: "stop", "length" or "abort" once finished.
    """

    request_id: int
    token_ids: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    max_len: int
    seed: int
    prompt_len: int = field(init=False)
    status: Status = Status.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_registered: int = 0
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        self.prompt_len = len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the model has yet to read; one in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_generated(self) -> int:
        """Tokens after the prompt."""
        return len(self.token_ids) - self.prompt_len

    def append(self, token: int) -> None:
        """Takes a generated token, and finishes the sequence if it was the last."""
        self.token_ids.append(token)
        if token in self.stop_ids:
            self.finish("stop")
        elif self.num_generated >= self.params.max_tokens or len(self.token_ids) >= self.max_len:
            self.finish("length")

    def finish(self, reason: str) -> None:
        self.status = Status.FINISHED
        self.finish_reason = reason
