"""Compiled schemas, regexes and grammars, and the tokens that they allow next.

A request that is to follow one has a matcher of xgrammar's, which is told every token that is
drawn. Before a step it fills a bit mask, a bit for each token of the vocabulary.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Collection
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nanovllm.engine.prompts import TextProcessor
from nanovllm.engine.scheduler import Step
from nanovllm.sampling_params import SamplingParams
from nanovllm.structured.patterns import text_pattern
from nanovllm.structured.schemas import translate
from nanovllm.utils.locks import exclusive
from nanovllm.utils.options import short

# Compiled ones that are kept; a large one takes some 100 MB.
KEPT = 32
# At a time between the parts of JSON: some models write nothing else once they have begun.
SPACES = 32


class Grammars:
    """What the requests of one engine may have to follow; threads may share it.

    Args:
        texts: of the engine, with its tokenizer.
        eos_ids: tokens that may follow once the grammar has ended, and nothing else then.
    """

    def __init__(self, texts: TextProcessor, eos_ids: Collection[int]) -> None:
        self.texts = texts
        self.eos_ids = sorted(eos_ids)
        self._compiled = lru_cache(KEPT)(self._compile)

    def check(self, params: SamplingParams) -> None:
        """Compiles what a request is to follow, if anything, so that its matcher costs nothing.

        Raises:
            ValueError: it does not compile, the engine has no tokenizer, or xgrammar is missing.
        """
        if params.structure is not None:
            self._compiled(*params.structure)

    def matcher(self, params: SamplingParams) -> Any | None:
        """A new `xgrammar.GrammarMatcher`; None if a request may say what it likes."""
        if params.structure is None:
            return None
        return self._library.GrammarMatcher(self._compiled(*params.structure))

    def masks(self, step: Step) -> dict[int, np.ndarray] | None:
        """By row of a step's logits, of those that ask, the mask of `logit_edits.forbid`."""
        if not step.asks:
            return None
        sampled = (chunk.seq.matcher for chunk in step.chunks if chunk.needs_sample)
        asking = {row: matcher for row, matcher in enumerate(sampled) if matcher is not None}
        if not asking:
            return None
        bits = np.full((len(asking), -(-self.texts.vocab_size // 32)), -1, np.int32)
        self._threads.batch_fill_next_token_bitmask(list(asking.values()), bits)
        return dict(zip(asking, bits, strict=True))

    def _compile(self, field: str, text: str) -> Any:
        try:
            compiled = self._run_compiler(field, text)
        except (RuntimeError, UnicodeError) as error:
            # Without the time and the place in the library's source.
            reason = re.sub(r"^(.*\n)*\[[\d:]+\] \S+: ", "", str(error).strip())
            raise ValueError(f"{field}={short(text)} is not allowed: {reason}") from error
        bits = np.zeros((1, -(-self.texts.vocab_size // 32)), np.int32)
        self._library.GrammarMatcher(compiled).fill_next_token_bitmask(bits)
        if not bits.any():
            raise ValueError(f"{field}={short(text)} is not allowed: no text can follow it")
        return compiled

    def _run_compiler(self, field: str, text: str) -> Any:
        if self.texts.tokenizer is None or not self.eos_ids:
            lacking = "tokenizer" if self.texts.tokenizer is None else "end-of-sequence token"
            raise ValueError(
                f"{field}={short(text)} is not allowed: model={self.texts.model!r} has no {lacking}"
            )
        if field == "json_schema":
            translated = json.dumps(translate(json.loads(text)))
            return self._compiler.compile_json_schema(translated, max_whitespace_cnt=SPACES)
        if field == "regex":
            return self._compiler.compile_regex(text_pattern(text))
        return self._compiler.compile_grammar(text)

    @cached_property
    def _library(self) -> Any:
        try:
            return importlib.import_module("xgrammar")
        except ImportError as error:
            raise ValueError(
                "json_schema, regex and grammar need the package xgrammar: "
                "pip install 'nano-vllm-pipeline[structured]'"
            ) from error

    @cached_property
    def _threads(self) -> Any:
        return self._library.BatchGrammarMatcher()

    @cached_property
    def _compiler(self) -> Any:
        info = exclusive(self.texts.lock, self._describe_tokens)
        return self._library.GrammarCompiler(info, cache_enabled=False)

    def _describe_tokens(self) -> Any:
        """The text of every token; special ones have none, since completions come without them."""
        xgrammar, tokenizer, size = self._library, self.texts.tokenizer, self.texts.vocab_size
        assert tokenizer is not None
        found = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=size, stop_token_ids=self.eos_ids
        )
        texts = list(found.decoded_vocab)
        added, special = tokenizer.added_tokens_decoder, self.texts.special_ids
        for token in filter(lambda token: token < size, {*added, *special}):
            texts[token] = b"" if token in special else added[token].content.encode()
        return xgrammar.TokenizerInfo(
            texts,
            xgrammar.VocabType.RAW,
            vocab_size=size,
            stop_token_ids=self.eos_ids,
            add_prefix_space=found.add_prefix_space,
        )
