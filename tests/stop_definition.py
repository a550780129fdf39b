"""What a stop text is, by definition: letter by letter, and each time decoding all tokens."""

from collections.abc import Callable, Collection

from nanovllm.engine.detokenizer import INCOMPLETE


def first_complete(text: str, stops: Collection[str]) -> tuple[int, int, str] | None:
    """End and start of the stop text that is complete first, and the longest of these."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end, end - len(stop), stop
    return None


def stopped(
    decode: Callable[[list[int]], str], ids: list[int], stops: Collection[str], keep_stop: bool
) -> tuple[str, list[int], str | None]:
    """Text, tokens and stop text of a request that would generate `ids`."""
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count])
        found = first_complete(text.rstrip(INCOMPLETE), stops)
        if found is not None:
            end, start, stop = found
            return text[: end if keep_stop else start], ids[:count], stop
    return decode(ids), ids, None
