"""The tokenizer of a checkpoint, if it has one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.utils.json_files import check_file, is_there, naming, read_object, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
# Vocabularies in other forms, which transformers may be able to convert.
OTHERS = ("tokenizer.model", "vocab.txt")
MORE = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja")
# A trace of where the tokenizer was saved.
NEVER_OPENED = ("special_tokens_map_file",)


class TokenizerError(ValueError):
    """The checkpoint's tokenizer is damaged or incomplete."""


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """Loads the tokenizer in `directory`; None if it holds none (a bare config.json).

    Raises:
        TokenizerError: a file of it is damaged, or missing among the others.
    """
    vocabularies = (TOKENIZER, CONFIG, VOCAB, MERGES, *OTHERS)
    found = [name for name in (*vocabularies, *MORE) if is_there(directory / name)]
    if not {*vocabularies} & {*found}:
        return None
    _check_files(directory, found)
    # Imported late: transformers takes seconds, and dummy weights do without it.
    from transformers import AutoTokenizer

    where = f"{directory}: the tokenizer cannot be loaded from {', '.join(found)}"
    with naming(where, TokenizerError):
        # NOTE: without the last argument transformers asks on stdin whether to run the
        # checkpoint's code.
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        eos = tokenizer.eos_token_id
        tokenizer.encode("")  # shows settings of wrong types, with any vocabulary
    if not (eos is None or isinstance(eos, int)):
        raise TokenizerError(f"{directory / CONFIG}: eos_token has the id {eos!r}, no integer")
    return tokenizer


def _check_files(directory: Path, found: list[str]) -> None:
    """Each file is readable and of its format, and none that belongs with another is missing."""
    templates = sorted(directory.glob("additional_chat_templates/*.jinja"))
    for path in [*(directory / name for name in found), *templates]:
        if path.name in OTHERS:
            check_file(path, TokenizerError)
        elif path.name == CONFIG:
            _refuse_paths(path, read_object(path, TokenizerError))
        elif path.suffix == ".json":
            read_object(path, TokenizerError)
        else:
            read_text(path, TokenizerError)
    if {TOKENIZER, *OTHERS} & {*found}:
        return
    # transformers takes a missing half for an empty one, and would split text another way.
    for name in (VOCAB, MERGES):
        if name not in found:
            raise TokenizerError(
                f"{directory / name} is missing, and there is no {TOKENIZER} in its place"
            )


def _refuse_paths(path: Path, fields: dict[str, object]) -> None:
    """Some versions of transformers open the files that these fields name, wherever they are."""
    for field, value in fields.items():
        if field in ("vocab", "merges", "init_inputs", "gguf_file"):
            allowed = not value or (field in ("vocab", "merges") and not isinstance(value, str))
        elif field.endswith(("_file", "_files")) and field not in NEVER_OPENED:
            names = value if isinstance(value, list) else [] if value is None else [value]
            allowed = all(_is_entry(path.parent, name) for name in names)
        else:
            continue
        if not allowed:
            raise TokenizerError(
                f"{path}: {field}={value!r:.200} must name files of this directory"
            )


def _is_entry(directory: Path, name: object) -> bool:
    return isinstance(name, str) and name == Path(name).name and is_there(directory / name)
