"""From what users ask for to sequences, and from sequences that have ended to completions."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from nanovllm.config import Config
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.outputs import Completion, Logprobs, PromptLogprobs
from nanovllm.engine.prompts import Prompt, TextProcessor, UndecodableError
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.layers.logit_edits import RequestEdits
from nanovllm.logprobs import Position
from nanovllm.sampling_params import (
    SamplingOptions,
    SamplingParams,
    check_runnable,
    params_per_prompt,
)
from nanovllm.structured.grammars import Grammars

logger = logging.getLogger(__name__)


class CheckedCall(NamedTuple):
    """What a call asks for, checked: token ids and options of each prompt.

    With `deltas` the texts are asked for while the requests run.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    deltas: bool = False


@dataclass
class RequestMaker:
    """Knows what all requests of an engine have in common."""

    config: Config
    texts: TextProcessor
    grammars: Grammars  # of what requests have to follow
    defaults: SamplingOptions  # of options that a call does not give
    eos_ids: Set[int]  # tokens that end a request, unless it ignores them

    def check(
        self,
        prompts: dict[str, Prompt],
        given: SamplingParams | Sequence[SamplingParams] | None,
        fields: SamplingOptions,
        deltas: bool = False,
    ) -> CheckedCall:
        """Raises TypeError or ValueError if this model cannot do what a call asks for.

        `prompts` are by the names that errors give them.
        """
        params = params_per_prompt(given, len(prompts), fields, self.defaults)
        check_runnable(params, self.texts.vocab_size)
        for each in params:
            self.grammars.check(each)
        if self.texts.tokenizer is None and (deltas or any(each.stop for each in params)):
            raise ValueError(
                f"stop and deltas are not allowed: model={self.config.model!r} has no tokenizer, "
                "and so no texts"
            )
        ids = [self.texts.encode(prompt, name) for name, prompt in prompts.items()]
        return CheckedCall(ids, params, deltas)

    def sequences(
        self, first_id: int, call: CheckedCall, results: dict[int, Any]
    ) -> list[EngineSequence]:
        """One for each sample of each prompt, in the order in which they are to run.

        Their ids begin with `first_id`, and their completions are to go to `results`.

        The first sample of a prompt is to be computed before the others, which then find its
        blocks in the prefix cache. So the first samples of as many prompts as run at a time come
        first, then the second ones, and so on.
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
            stop_ids = frozenset(params.stop_token_ids or ())
            seq = EngineSequence(
                request_id=request_id,
                token_ids=list(call.prompts[index]),
                params=params,
                stop_ids=stop_ids | self._eos_ids(params),
                max_len=self.texts.max_len,
                seed=sample_seed(params.seed, sample),
                results=results,
                index=index,
                sample=sample,
                leader=leaders.get(index),
                edits=RequestEdits.of(params, stop_ids | self.eos_ids, self.texts.vocab_size),
                matcher=self.grammars.matcher(params),
            )
            if call.deltas or params.stop:
                seq.detokenizer = self._detokenizer(seq)
            if self.config.enable_prefix_caching and seq.prompt_len > block_size:
                leaders.setdefault(index, seq)
            seqs.append(seq)
        return seqs

    def completion(self, seq: EngineSequence) -> Completion:
        """What has become of a sequence that has ended."""
        reason = seq.finish_reason
        assert reason is not None
        detokenizer = seq.detokenizer or self._detokenizer(seq)
        last, end = seq.token_ids[-1], len(seq.token_ids)
        stop_reason: str | int | None = None
        if reason == "stop" and last in seq.stop_ids:
            if not seq.params.include_stop_str_in_output:
                end -= 1
            stop_reason = None if last in self._eos_ids(seq.params) else last
        elif reason == "stop":
            stop_reason = detokenizer.progress.stop
        try:
            text = detokenizer.whole_text(seq.token_ids[:end])
            logprobs, prompt_logprobs = self._logprobs(seq)
        except UndecodableError as error:
            logger.warning("Request %d: %s", seq.request_id, error)
            text, reason, stop_reason = detokenizer.progress.text, "error", None
            logprobs = prompt_logprobs = None
        else:
            if reason == "error":
                logger.warning(
                    "Request %d ends in error: its logits are not numbers, or no token is allowed",
                    seq.request_id,
                )
        return Completion(
            text=text,
            token_ids=seq.token_ids[seq.prompt_len :],
            finish_reason=reason,
            stop_reason=stop_reason,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            index=seq.index,
            sample=seq.sample,
            prompt_token_ids=seq.token_ids[: seq.prompt_len],
            queued_time=seq.queued_time,
            first_token_time=seq.first_token_time,
            end_time=time.perf_counter(),
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

    def _eos_ids(self, params: SamplingParams) -> Set[int]:
        """The end-of-sequence tokens that end a request; behind a structure nothing may follow."""
        ignored = params.ignore_eos and params.structure is None
        return frozenset() if ignored else self.eos_ids

    def _detokenizer(self, seq: EngineSequence) -> Detokenizer:
        skip = seq.params.skip_special_tokens
        decode = partial(self.texts.decode, skip_special_tokens=skip)
        silent = self.texts.special_ids if skip else ()
        return Detokenizer(decode, seq.prompt_len, seq.params, silent)


def sample_seed(seed: int | None, sample: int) -> int:
    """The seed of a sample; that of the first is the seed of its request."""
    if seed is None:
        return random.getrandbits(63)
    return random.Random(f"{seed} {sample}").getrandbits(63) if sample else seed
