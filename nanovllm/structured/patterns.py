r"""Regular expressions that xgrammar reads as they are meant; all others are refused.

They are JavaScript's, whose \w and \d are ASCII, and match a whole text. In JSON's strings xgrammar
takes one apart to single bytes. So there it must not need an escape, and characters beyond ASCII
come from classes that are written out here: xgrammar's own let in bytes that are no characters.
"""

from __future__ import annotations

import re

# A character that stands in a JSON string as it is, beyond ASCII.
_BEYOND_ASCII = r"[\u0080-\u07ff]|[\u0800-\ud7ff\ue000-\uffff]|[\u{10000}-\u{10ffff}]"
_IN_STRINGS = [c for c in map(chr, range(0x20, 0x7F)) if c not in '"\\']
# Its automaton has a state for each, and takes minutes to make from many.
MAX_STATES = 1000
# Together they bound the time of a compilation, which nothing else does.
MAX_REGEX = 2**14

_TOKEN = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]|\{[^}]*\}|.", re.DOTALL)
_KNOWN_LETTERS = "dDwWsSnrtfvxu"


def text_pattern(text: str) -> str:
    """A regex of a whole text for xgrammar; raises ValueError with what is allowed instead."""
    tokens = _tokens(text)
    for token in tokens:
        if token[0] == "\\":
            _check_escape(token, _KNOWN_LETTERS)
    return "".join(r"[^\n\r]" if token == "." else token for token in tokens)


def string_pattern(text: str) -> str:
    """A regex of the inside of a JSON string; raises ValueError with what is allowed instead."""
    parts, sizes = [], [[0, 0]]  # of each open group: states before the last item, and of it
    for token in _tokens(text):
        parts.append(_in_string(token))
        if token in "*+?|^$":
            continue
        before, last = sizes[-1]
        if token == "(":
            sizes.append([0, 0])
            continue
        if token == ")" and len(sizes) > 1:
            sizes.pop()
            sizes[-1] = [sum(sizes[-1]), before + last]
        elif token[0] == "{":
            sizes[-1][1] = last * max(map(int, re.findall(r"\d+", token)), default=1)
        else:
            sizes[-1] = [before + last, 1]
        if sum(sizes[-1]) > MAX_STATES:
            raise ValueError(f"of at most {MAX_STATES} characters with its repetitions")
    return "".join(parts)


def _tokens(text: str) -> list[str]:
    """The parts of a regex: escapes, classes, repetitions, and single characters."""
    if len(text) > MAX_REGEX:
        raise ValueError(f"a regular expression of at most {MAX_REGEX} characters")
    tokens = _TOKEN.findall(text)
    for place, token in enumerate(tokens):
        if token == ("^" if place else "") or (token == "$" and place < len(tokens) - 1):
            raise ValueError("without ^ and $ but at its ends: xgrammar would ignore them")
        if len(token) > 1 and token[0] == "[":
            for escape in re.findall(r"\\.", token, re.DOTALL):
                _check_escape(escape, _KNOWN_LETTERS)
    return tokens


def _in_string(token: str) -> str:
    if token == ".":
        return _any_of(_IN_STRINGS)
    if token.startswith("[^"):
        try:
            return _any_of([c for c in _IN_STRINGS if re.fullmatch(token, c)])
        except re.error as error:
            raise ValueError(f"a regular expression; {token} is none: {error}") from None
    if not token.isascii() or not token.isprintable() or '"' in token or "\\\\" in token:
        raise ValueError("of printable ASCII characters that JSON does not escape")
    for escape in re.findall(r"\\.", token):
        _check_escape(escape, "dws")
    return token


def _any_of(characters: list[str]) -> str:
    """One of these, or any beyond ASCII."""
    own = "".join(c if c.isalnum() else f"\\{c}" for c in characters)
    return f"([{own}]|{_BEYOND_ASCII})" if own else f"({_BEYOND_ASCII})"


def _check_escape(escape: str, letters: str) -> None:
    if escape[1:].isalnum() and escape[1:] not in letters:
        raise ValueError(f"without {escape}: of the escapes with letters, {', '.join(letters)} are")
