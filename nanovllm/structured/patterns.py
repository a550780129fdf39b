r"""Regular expressions that xgrammar reads as they are meant; all others are refused.

They are JavaScript's, with \w, \d and \s of ASCII, and match a whole text (to \s the no-break space
belongs, too). In JSON's strings xgrammar takes one apart to single bytes. So there it must not need
an escape, and characters beyond ASCII come from classes that are written out here: xgrammar's own
let in bytes that are no characters.
"""

from __future__ import annotations

import re
import sys
from itertools import pairwise

# Its automaton has a state for each, and takes minutes to make from many.
MAX_STATES = 1000
# Together they bound the time of a compilation, which nothing else does.
MAX_REGEX = 2**14

# What JSON does not escape.
_PLAIN = [c for c in map(chr, range(0x20, 0x7F)) if c not in '"\\']
# All that "." means, but for the line separators among them.
_BEYOND_ASCII = r"|[\u0080-\u07ff]|[\u0800-\u2027\u202a-\ud7ff\ue000-\uffff]|[\u{10000}-\u{10ffff}]"
_TOKEN = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]|\{[^}]*\}|.", re.DOTALL)
_GROUP = re.compile(r"\?(:|<[A-Za-z_]\w*>)")
_CHARACTER = r"\\u\{[0-9a-fA-F]+\}|\\u[0-9a-fA-F]{4}|\\U[0-9a-fA-F]{8}|\\x[0-9a-fA-F]{2}|\\.|."
_CODE = re.compile(r"\\(?:u\{([0-9a-fA-F]+)\}|u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|.)", re.DOTALL)
_SPECIAL = set(r"\^$.*+?()[]{}|-")
_RANGE = re.compile(f"({_CHARACTER})(?:-({_CHARACTER}))?", re.DOTALL)
_FIRST_SURROGATE, _LAST_SURROGATE = 0xD800, 0xDFFF


def text_pattern(text: str) -> str:
    """A regex of a whole text for xgrammar; raises ValueError with what is allowed instead."""
    check_characters(text)
    tokens = _tokens(_spelled_out(text), "dDwWsSnrtfvxu")
    if any(token.startswith("[\\^") for token in tokens):
        raise ValueError("without \\^ at the beginning of a class: xgrammar would read [^")
    return "".join(map(_in_text, tokens))


def _spelled_out(text: str) -> str:
    """Characters for their codes: to xgrammar a code may go on in the digits behind it."""

    def character(match: re.Match[str]) -> str:
        digits = next(filter(None, match.groups()), None)
        if digits is None:
            return match[0]
        found = chr(int(digits, 16))
        return f"\\{found}" if found in _SPECIAL else found

    return _CODE.sub(character, text)


def _in_text(token: str) -> str:
    """What xgrammar is given: any character but a line's end, and no class of two kinds.

    NOTE: of a class of ASCII and other characters, repeated from 2 or more to over 128 times,
    xgrammar allows tokens that it then refuses.
    """
    if token == ".":
        return "[^\\n\\r\u2028\u2029]"
    if token[0] != "[" or token[1:2] == "^" or re.search(r"\\[DWS]", token):
        return token
    low, high = [], []
    for first, last in _RANGE.findall(token[1:-1]):
        member = f"{first}-{last}" if last else r"\-" if first == "-" else first
        if _code(last or first) < 0x80:
            low.append(member)
        elif _code(first) >= 0x80:
            high.append(member)
        else:
            low.append(f"{first}-\x7f")
            high.append(f"\x80-{last}")
    low.sort(key=lambda member: member[0] == "^")  # which would negate the class
    if not low or not high or low[0][0] == "^":
        return token
    return f"([{''.join(low)}]|[{''.join(high)}])"


def string_pattern(text: str) -> str:
    """A regex of the inside of a JSON string; raises ValueError with what is allowed instead."""
    tokens = _tokens(text, "dwsnrtfv")
    _check_size(tokens)
    _check_groups(tokens)
    # NOTE: of an optional group xgrammar also allows what may be repeated in it, alone.
    parts = zip(["", *tokens], map(_in_string, tokens), strict=False)
    return "".join("{0,1}" if (before, part) == (")", "?") else part for before, part in parts)


def _tokens(text: str, letters: str) -> list[str]:
    """The parts of a regex: escapes, classes, repetitions, and single characters."""
    if len(text) > MAX_REGEX:
        raise ValueError(f"a regular expression of at most {MAX_REGEX} characters")
    _check_escapes(text, letters)
    tokens = _TOKEN.findall(text)
    if "^" in tokens[1:] or "$" in tokens[:-1]:
        raise ValueError("without ^ and $ but at its ends: xgrammar would ignore them")
    return tokens


def check_characters(text: str) -> None:
    """Refuses what is no character in a regex or a grammar: xgrammar makes bytes of it anyway."""
    for first, last in _RANGE.findall(text):
        begin, end = _code(first), _code(last or first)
        if (end >= _FIRST_SURROGATE and begin <= _LAST_SURROGATE) or end > sys.maxunicode:
            raise ValueError(
                f"without {first}{last and f'-{last}'}: surrogates, U+D800 to U+DFFF, and what is "
                "beyond U+10FFFF are no characters"
            )


def _code(character: str) -> int:
    escape = re.fullmatch(r"\\[uUx]\{?([0-9a-fA-F]+)\}?", character)
    return int(escape[1], 16) if escape else ord(character[-1])


def _check_escapes(text: str, letters: str) -> None:
    for escape in re.findall(r"\\.", text, re.DOTALL):
        if escape[1].isalnum() and escape[1] not in letters:
            raise ValueError(f"without {escape}: escapes with letters are {', '.join(letters)}")


def _check_groups(tokens: list[str]) -> None:
    """Refuses what xgrammar knows of a text, and ignores in a string of JSON."""
    for place, (token, after) in enumerate(pairwise(tokens)):
        if token == "(" and after == "?" and not _GROUP.match("".join(tokens[place + 1 :])):
            raise ValueError("without (? but for (?: and (?<name>: xgrammar would ignore it")
        if token[0] in "*+{" and after[0] in "*+{":
            raise ValueError(f"a regular expression; {token}{after} repeats what is repeated")


def _check_size(tokens: list[str]) -> None:
    """Refuses what may have too many states, as if all of it stood in each repeated group."""
    states, repeated = 0, 1
    for before, token in pairwise(["", *tokens]):
        if token[0] == "{":
            count = max(map(int, re.findall(r"\d+", token)), default=1)
            if before == ")":
                repeated *= max(count, 1)
            else:
                states += count
        elif token not in "()*+?|^$":
            states += 1
    if states * repeated > MAX_STATES:
        raise ValueError(f"of at most {MAX_STATES} characters with its repetitions")


def _in_string(token: str) -> str:
    if token == ".":
        return _any_of(_PLAIN, _BEYOND_ASCII)
    negated = token.startswith("[^")
    escaped = not negated and ('"' in token or "\\\\" in token)
    if escaped or not token.isascii() or not token.isprintable():
        raise ValueError("of printable ASCII characters that JSON does not escape")
    if not negated:
        _check_escapes(token, "dws")
        return token
    try:
        allowed = [c for c in _PLAIN if re.fullmatch(token, c)]
    except re.error as error:
        raise ValueError(f"a regular expression; {token} is none: {error}") from None
    if not allowed:
        raise ValueError(f"a regular expression in which {token} is some ASCII character")
    # Which characters beyond ASCII are digits, letters and spaces depends on the reader.
    return _any_of(allowed, "" if re.search(r"\\[dws]", token) else _BEYOND_ASCII)


def _any_of(characters: list[str], beyond: str) -> str:
    return "([" + "".join(f"\\{c}" if c in "\\]^-[" else c for c in characters) + f"]{beyond})"
