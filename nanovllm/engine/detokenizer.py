"""The text of a request while its tokens still come, and the stop text that ends it.

A character may be divided among several tokens, and some tokenizers write the first token of a text
otherwise than the others. So no token is decoded alone, but a window of the last ones, of whose
text all but the end is known. If the window ends with the sign for bytes that make no character,
they may still become one, and are held back.

    tokens:  ... | window, decoded again for each token |
    text:    ... | known already  | new     | held back |
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from nanovllm.engine.prompts import UndecodableError
from nanovllm.sampling_params import SamplingParams

# What decoders write for bytes that are no character, or none so far.
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens of a window before the next one begins.
WINDOW = 16


class Progress(NamedTuple):
    """How far the tokens of a request have been read; replaced as a whole, so never half new."""

    begin: int  # the first token of the window
    settled: int  # the first token that the next window must have
    end: int  # the first token that has not been read
    known: int = 0  # characters of the window that are in `text`
    text: str = ""  # so far, up to the stop text
    stop: str | None = None  # the stop text that has been found


class Detokenizer:
    """Reads the tokens of one request, from `first` on, by `decode`, which gives their text.

    `params` say which texts end the request, whether these belong to the text, and how many tokens
    there must be before. `decode` leaves the `silent` tokens out.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        first: int,
        params: SamplingParams,
        silent: Collection[int] = (),
    ) -> None:
        self.silent = silent
        self.decode, self.stops = decode, tuple(params.stop or ())
        self.keep_stop = params.include_stop_str_in_output
        self.first_stop_end = first + params.min_tokens + 1
        self.progress = Progress(first, first, first)

    def read(self, token_ids: list[int]) -> str | None:
        """Reads the tokens that are new; "stop" or "error" if the request ends with them."""
        try:
            while self.progress.stop is None and self.progress.end < len(token_ids):
                self.progress = self._read_next(token_ids)
        except UndecodableError:
            return "error"
        return None if self.progress.stop is None else "stop"

    def _read_next(self, token_ids: list[int]) -> Progress:
        begin, settled, end, known, text, _ = self.progress
        end += 1
        if token_ids[end - 1] in self.silent:  # a window of these alone would grow with each
            return self.progress._replace(end=end)
        window = self.decode(token_ids[begin:end])
        complete = window.rstrip(INCOMPLETE)
        if len(complete) <= known:
            return self.progress._replace(end=end)
        longer = text + complete[known:]
        stops = self.stops if end >= self.first_stop_end else ()
        found = first_stop(longer, len(text), stops)
        if found is not None:
            stop, start = found
            kept = longer[: start + len(stop) * self.keep_stop]
            return Progress(begin, settled, end, len(complete), kept, stop)
        if complete != window:
            return Progress(begin, settled, end, len(complete), longer)
        if end - begin < WINDOW:
            return Progress(begin, end, end, len(window), longer)
        # The next window begins with tokens that have a text.
        return Progress(settled, end, end, len(self.decode(token_ids[settled:end])), longer)

    def safe_text(self) -> tuple[str, int]:
        """The text so far, without what may become a stop text, and the end of its tokens."""
        progress = self.progress
        held = 0
        if progress.stop is None and not self.keep_stop:
            held = held_back(progress.text, self.stops)
        return progress.text[: len(progress.text) - held], progress.end

    def whole_text(self, token_ids: list[int]) -> str:
        """The text, once no token follows; UndecodableError if the last tokens have none."""
        progress = self.progress
        if progress.stop is not None:
            return progress.text
        return progress.text + self.decode(token_ids[progress.begin :])[progress.known :]


def first_stop(text: str, begin: int, stops: Sequence[str]) -> tuple[str, int] | None:
    """The stop text that is complete first, of those that end behind `begin`, and its start.

    Of several that are complete at the same character, it is the longest. So it does not depend on
    how the text came in parts.
    """
    starts = [(stop, text.find(stop, max(begin + 1 - len(stop), 0))) for stop in stops]
    found = [(stop, start) for stop, start in starts if start >= 0]
    return min(found, key=lambda pair: (pair[1] + len(pair[0]), pair[1]), default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of a text that may be the beginning of a stop text."""
    longest = min(max(map(len, stops), default=1) - 1, len(text))
    sizes = range(longest, 0, -1)
    return next((size for size in sizes if any(s.startswith(text[-size:]) for s in stops)), 0)
