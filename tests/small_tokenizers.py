"""Small tokenizers of the kinds that there are, made by the library that models use."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

END = "<|end|>"  # a special token
THINK = "<think> "  # an added token that is none
# With the single bytes, letters can be cut in any way.
PIECES = [
    *(" the", "stop", "sto", "top", "ST", "OP", "\n\n", "é", "日本", "🙂", "a\u0301"),
    *(b"\xe6\x97", b"\xa5\xe6", b"ab\xf0\x9f", b"\x99\x82c"),
]


def byte_level(pieces: Sequence[str | bytes] = PIECES) -> Tokenizer:
    """As Qwen's and Llama 3's: tokens are bytes. Token i is byte i, for i below 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [piece.encode() if isinstance(piece, str) else piece for piece in pieces]
    vocab = {"".join(map(letters.get, token)): i for i, token in enumerate(tokens)}  # type: ignore[arg-type]
    tokenizer = Tokenizer(BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_added(tokenizer)


def fill(vocab: int) -> list[str | bytes]:
    """Pieces for a byte-level vocabulary of that size, with two added tokens."""
    pieces, count = list(PIECES), vocab - 256 - 2
    letters = "etaoin shrdlu\nédß日🙂".encode()
    draw = random.Random(0)
    while len(pieces) < count:
        start = draw.randrange(len(letters))
        piece = letters[start : start + draw.randint(2, 5)] + bytes([draw.choice(letters)])
        if piece not in pieces and piece.decode("utf-8", "replace") not in pieces:
            pieces.append(piece)
    return pieces


def sentence_pieces() -> Tokenizer:
    """As Llama 2's: a sign for spaces, the first of which is dropped, and bytes for the rest."""
    pieces = ["▁", "▁the", "a", "b", "▁a", "▁▁", ".", ",", "▁,", "日", "é", "stop", "▁st", "op"]
    vocab = {piece: i for i, piece in enumerate(["<unk>", *pieces])}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    return with_added(tokenizer)


def word_pieces() -> Tokenizer:
    """As BERT's: words have spaces between them, and "##" goes on with one."""
    pieces = ["[UNK]", "the", "##re", "stop", "##s", "a", ".", ",", "'", "s", "n", "##'", "é"]
    tokenizer = Tokenizer(WordPiece({piece: i for i, piece in enumerate(pieces)}))
    tokenizer.decoder = decoders.WordPiece()
    return with_added(tokenizer)


def with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.add_tokens([AddedToken(THINK, normalized=False)])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": byte_level,
    "sentence pieces": sentence_pieces,
    "word pieces": word_pieces,
}


def write(tokenizer: Tokenizer, directory: Path) -> None:
    """Gives the model in `directory` this tokenizer."""
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
