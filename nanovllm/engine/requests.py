"""From what users ask for to sequences, and from sequences that have ended to completions."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection, Sequence, Set
from typing import Any, NamedTuple

from nanovllm.config import Config
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.outputs import Completion, Logprobs, PromptLogprobs
from nanovllm.engine.prompts import (
    Prompt,
    Prompts,
    TextProcessor,
    UndecodableError,
    list_prompts,
)
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.layers.logit_edits import RequestEdits
from nanovllm.logprobs import Position
from nanovllm.sampling_params import (
    SamplingOptions,
    SamplingParams,
    check_token_ids,
    params_per_prompt,
)
from nanovllm.structured.grammars import Grammars

logger = logging.getLogger(__name__)

GivenParams = SamplingParams | Sequence[SamplingParams] | None


class CheckedCall(NamedTuple):
    """What a call asks for, checked: token ids and options of each prompt.

    With `deltas` the texts are asked for while the requests run.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    deltas: bool = False


class RequestMaker:
    """Knows what all requests of an engine have in common.

    Args:
        config: of the engine.
        texts: turns texts into tokens, and back.
        defaults: of options that a call does not give.
        eos_ids: tokens that end a request, unless it ignores them.
        max_len: length in tokens at which it ends in any case.
        edits_of: makes what a request changes of its logits, from its options and the tokens that
            end it.
        grammars: of what requests have to follow.
    """

    def __init__(
        self,
        config: Config,
        texts: TextProcessor,
        defaults: SamplingOptions,
        eos_ids: Set[int],
        max_len: int,
        edits_of: Callable[[SamplingParams, Collection[int]], RequestEdits | None],
        grammars: Grammars,
    ) -> None:
        self.config, self.texts, self.defaults = config, texts, defaults
        self.eos_ids, self.max_len, self.edits_of = eos_ids, max_len, edits_of
        self.grammars = grammars

    def check(
        self,
        prompts: Prompts,
        given: GivenParams,
        fields: SamplingOptions,
        deltas: bool = False,
    ) -> CheckedCall:
        """Raises TypeError or ValueError if this model cannot do what a call asks for."""
        listed = list_prompts(prompts)
        params = self._check_params(given, len(listed), fields, deltas)
        ids = [self.texts.encode(prompt, f"prompts[{i}]") for i, prompt in enumerate(listed)]
        return CheckedCall(ids, params, deltas)

    def check_one(
        self, prompt: Prompt, given: SamplingParams | None, fields: SamplingOptions
    ) -> CheckedCall:
        """The same for a request that is added alone."""
        params = self._check_params(given, 1, fields)
        if params[0].n != 1:
            raise ValueError(f"n={params[0].n} is not allowed for a single request: it must be 1")
        return CheckedCall([self.texts.encode(prompt, "prompt")], params)

    def _check_params(
        self, given: GivenParams, count: int, fields: SamplingOptions, deltas: bool = False
    ) -> list[SamplingParams]:
        params = params_per_prompt(given, count, fields, self.defaults)
        check_token_ids(params, self.texts.vocab_size)
        for each in params:
            self.grammars.check(each)
        if self.texts.tokenizer is None and (deltas or any(each.stop for each in params)):
            raise ValueError(
                f"stop and deltas are not allowed: model={self.config.model!r} has no tokenizer, "
                "and so no texts"
            )
        return params

    def sequences(
        self, first_id: int, call: CheckedCall, results: dict[int, Any]
    ) -> list[EngineSequence]:
        """One for each sample of each prompt, in the order in which they are to run.

        The first sample of a prompt is to be computed before the others, which then find its
        blocks in the prefix cache. So the first samples of as many prompts as run at a time come
        first, then the second ones, and so on.

        Args:
            first_id: request id of the first sequence.
            call: what is to be done.
            results: where the completions are to go.
        """
        block_size = self.config.kvcache_block_size
        most = max((params.n for params in call.params), default=1)
        group = max(self.config.max_num_seqs // most, 1)
        places = [(i, sample) for i, params in enumerate(call.params) for sample in range(params.n)]
        places.sort(key=lambda place: (place[0] // group, place[1]))
        leaders: dict[int, EngineSequence] = {}
        seqs = []
        for request_id, (index, sample) in enumerate(places, first_id):
            params = call.params[index]
            matcher = self.grammars.matcher(params)
            stop_ids = frozenset(params.stop_token_ids or ())
            ignores_eos = params.ignore_eos and matcher is None  # after which nothing may follow
            seq = EngineSequence(
                request_id=request_id,
                token_ids=list(call.prompts[index]),
                params=params,
                stop_ids=stop_ids if ignores_eos else stop_ids | self.eos_ids,
                max_len=self.max_len,
                seed=sample_seed(params.seed, sample),
                results=results,
                index=index,
                sample=sample,
                leader=leaders.get(index),
                edits=self.edits_of(params, stop_ids | self.eos_ids),
                matcher=matcher,
            )
            if call.deltas or params.stop:
                seq.detokenizer = self._detokenizer(seq)
            if self.config.enable_prefix_caching and seq.prompt_len > block_size:
                leaders.setdefault(index, seq)
            seqs.append(seq)
        return seqs

    def completion(self, seq: EngineSequence) -> Completion:
        """What has become of a sequence that has ended."""
        reason, detokenizer = seq.finish_reason, seq.detokenizer
        assert reason is not None
        by_token = reason == "stop" and seq.token_ids[-1] in seq.stop_ids
        end = len(seq.token_ids)
        if by_token and not seq.params.include_stop_str_in_output:
            end -= 1
        try:
            text = self._text(seq, end)
            logprobs, prompt_logprobs = self._logprobs(seq)
        except UndecodableError as error:
            logger.warning("Request %d: its text cannot be decoded: %s", seq.request_id, error)
            text, reason = detokenizer.progress.text if detokenizer else "", "error"
            logprobs = prompt_logprobs = None
        else:
            if reason == "error":
                name = seq.request_id
                logger.warning(
                    "Request %d ends in error: its logits are not numbers, or no token is allowed",
                    name,
                )
        return Completion(
            text=text,
            token_ids=seq.token_ids[seq.prompt_len :],
            finish_reason=reason,
            stop_reason=self._stop_reason(seq) if reason == "stop" else None,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            index=seq.index,
            sample=seq.sample,
            prompt_token_ids=seq.token_ids[: seq.prompt_len],
            queued_time=seq.queued_time,
            first_token_time=seq.first_token_time,
            end_time=time.perf_counter(),
        )

    def _text(self, seq: EngineSequence, end: int) -> str:
        """The text of what was generated before `end`, up to a stop text."""
        if seq.detokenizer is not None:
            return seq.detokenizer.whole_text(seq.token_ids[:end])
        return self.texts.decode(
            seq.token_ids[seq.prompt_len : end], seq.params.skip_special_tokens
        )

    def _logprobs(self, seq: EngineSequence) -> tuple[Logprobs | None, PromptLogprobs | None]:
        """Those of what was generated and of the prompt, if they were asked for."""

        def dicts(positions: list[Position]) -> Logprobs:
            return [position.as_dict(self.texts.token_text) for position in positions]

        params, count = seq.params, len(seq.token_ids) - seq.prompt_len
        return (
            None if params.logprobs is None else dicts(seq.logprobs[:count]),
            None if params.prompt_logprobs is None else [None, *dicts(seq.prompt_logprobs)],
        )

    def _stop_reason(self, seq: EngineSequence) -> str | int | None:
        """The text or the token of `stop_token_ids` that ended it."""
        last = seq.token_ids[-1]
        if last not in seq.stop_ids:
            return None if seq.detokenizer is None else seq.detokenizer.progress.stop
        is_eos = last in self.eos_ids and (seq.matcher is not None or not seq.params.ignore_eos)
        return None if is_eos else last

    def _detokenizer(self, seq: EngineSequence) -> Detokenizer:
        def decode(token_ids: list[int]) -> str:
            return self.texts.decode(token_ids, seq.params.skip_special_tokens)

        stops = tuple(seq.params.stop or ())
        return Detokenizer(
            decode,
            seq.prompt_len,
            stops,
            seq.params.include_stop_str_in_output,
            seq.params.min_tokens,
        )


def sample_seed(seed: int | None, sample: int) -> int:
    """The seed of a sample; that of the first is the seed of its request."""
    if seed is None:
        return random.getrandbits(63)
    return random.Random(f"{seed} {sample}").getrandbits(63) if sample else seed
