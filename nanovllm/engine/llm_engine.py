"""The engine: takes requests, runs steps until they are finished, gives back text.

    with LLMEngine("path/to/Qwen3-0.6B") as engine:
        outputs = engine.generate(["Hello, world!"], max_tokens=50)

request -> Scheduler (which tokens next?) -> ModelRunner (compute them) -> Scheduler (what now?)
"""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from tqdm import tqdm
from typing_extensions import Unpack

from nanovllm.config import Config, ConfigOptions
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.conversations import Conversation, list_conversations
from nanovllm.engine.model_runner import LaunchedStep, ModelRunner
from nanovllm.engine.parallel.ranks import Ranks
from nanovllm.engine.prompts import Prompt, Prompts, TextProcessor, list_prompts
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.engine.transactions import Transactions
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models import load_config
from nanovllm.sampling_params import SamplingOptions, SamplingParams, params_per_prompt
from nanovllm.utils.device import resolve_device
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.locks import exclusive
from nanovllm.utils.options import taking
from nanovllm.utils.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)


class Completion(TypedDict):
    """What `generate` returns for a prompt.

    `finish_reason`: "stop", "length", "abort", or "error" if logits were not numbers or the tokens
    have no text.
    """

    text: str
    token_ids: list[int]
    finish_reason: str


class RequestOutput(Completion):
    """What `step` returns for a request that has finished."""

    request_id: int


class LLMEngine:
    """An offline inference engine for one model.

    Args:
        model: a directory or hub id, or a `Config` that says everything.
        options: fields of `Config`.

    Raises:
        TypeError, ValueError: an option is unknown or not allowed, or the model is not supported.
        FileNotFoundError, ImportError: the model, or the attention back end's package, is missing.
        MemoryError: no KV block fits.
        RankDiedError: another rank ended.
        PipelineUnavailable, GreenContextError: there is no pipeline, with `pipeline_strict`.

    NOTE: under torchrun the ranks above 0 serve rank 0 from within this constructor; when rank 0's
    engine exits, they end with SystemExit(0). The rest of the script runs on rank 0 alone.
    """

    @taking(Config)
    def __init__(
        self,
        model: str | os.PathLike[str] | Config | None = None,
        **options: Unpack[ConfigOptions],
    ) -> None:
        """Loads the model and gets the memory for its KV cache."""
        if not isinstance(model, Config):
            model = Config() if model is None else Config(model)  # type: ignore[arg-type]
        self.config = config = dataclasses.replace(model, **options) if options else model
        directory = resolve_model(config.model)
        # Before anything else is read, and before other processes start and all stumble over it.
        load_config(directory).rank_heads(ParallelGroup(size=config.tensor_parallel_size))
        self.tokenizer = load_tokenizer(directory)
        self.model_runner = runner = _start_runner(config, directory)
        self.transactions = Transactions()
        # Closes at garbage collection or interpreter exit at the latest, without keeping us alive.
        self._finalizer = weakref.finalize(self, self.transactions.call_at_exit, runner.close)
        limits = {
            "max_model_len": runner.max_model_len,
            "the KV cache, all of its blocks together,": runner.capacity,
        }
        self.max_len = min(limits.values())
        vocab_size = runner.model_config.vocab_size
        self.texts = TextProcessor(config.model, self.tokenizer, vocab_size, limits)
        # From config.json, generation_config.json and the tokenizer together.
        self.eos_ids = set(runner.model_config.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            self.eos_ids.add(self.tokenizer.eos_token_id)
        blocks = BlockManager(
            runner.num_blocks, config.kvcache_block_size, config.enable_prefix_caching
        )
        self.scheduler = Scheduler(blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self.in_flight: LaunchedStep | None = None
        # Until their completions have been put where they belong.
        self.requests: dict[int, EngineSequence] = {}
        # Completions of `add_request`, until `step` returns them.
        self.unclaimed: dict[int, Completion] = {}
        self.next_request_id = 0
        self.in_step = False

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.exit()

    def exit(self) -> None:
        """Drops all requests, ends the other ranks and frees the device; may be called twice."""
        if self.transactions.is_own_process():
            self.transactions.call(self._close)

    def _close(self) -> None:
        self.transactions.closed = True
        self.requests, self.unclaimed, self.in_flight = {}, {}, None
        if not self.model_runner.closed:
            self.model_runner.close()
        self._finalizer.detach()

    @taking(SamplingParams)
    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Completes `prompts`, in one continuous batch with those of other threads.

        Args:
            prompts: a text, or a list of texts or lists of token ids. `{"prompt": text}` and
                `{"prompt_token_ids": ids}`, alone or in a list, are the same.
            sampling_params: for all prompts, or one per prompt.
            use_tqdm: whether to show a progress bar.
            sampling: fields of `SamplingParams`, instead of `sampling_params`.

        Raises:
            TypeError, ValueError: a prompt or option is not allowed; then none has been run.
            RuntimeError: the engine has exited, or exits meanwhile.
        """
        prompts = list_prompts(prompts)
        params = params_per_prompt(sampling_params, len(prompts), sampling)
        self.transactions.check_open()
        ids = [self.texts.encode(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        results: dict[int, Completion] = {}
        try:
            requests = self.transactions.call(self._queue, ids, params, results)
            self._run(results, len(requests), use_tqdm)
        finally:
            # After an interrupt or an error, nothing of this call stays behind.
            self.transactions.call(self._drop, results)
        return [results[request_id] for request_id in requests]

    @taking(SamplingParams)
    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Answers one conversation or a list of them, by the chat template of the tokenizer.

        Args:
            messages: a list of `{"role": ..., "content": ...}`, or a list of such lists.
            chat_template: a Jinja template instead of the tokenizer's.
            add_generation_prompt: whether the beginning of an answer follows the messages.
            chat_template_kwargs: what else the template may ask for, such as `enable_thinking`.

        The other arguments are those of `generate`.

        Raises:
            TypeError, ValueError: there is no template, or a message or option is not allowed.
            RuntimeError: the engine has exited, or exits meanwhile.
        """
        self.transactions.check_open()
        ids = [
            self.texts.encode_chat(
                conversation,
                f"messages[{i}]",
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                chat_template_kwargs=chat_template_kwargs,
            )
            for i, conversation in enumerate(list_conversations(messages))
        ]
        return self.generate(ids, sampling_params, use_tqdm, **sampling)

    @taking(SamplingParams)
    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> int:
        """Queues one prompt and returns its request id; `step` will return its completion.

        Raises:
            TypeError, ValueError: the prompt or an option is not allowed.
        """
        (params,) = params_per_prompt(sampling_params, 1, sampling)
        self.transactions.check_open()
        token_ids = self.texts.encode(prompt, "prompt")
        (request,) = self.transactions.call(self._queue, [token_ids], [params], self.unclaimed)
        return request

    @taking(SamplingParams)
    def add_computed_request(
        self,
        token_ids: list[int],
        sampling_params: SamplingParams | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> int:
        """Adds a request that decodes at once: all its tokens but the last count as computed.

        For benchmarks: its KV blocks hold whatever they held, and its token ids are not checked.

        Raises:
            ValueError: there is no room for it, or the engine caches prefixes, and so would hand
                on what was never computed.
        """
        if self.config.enable_prefix_caching:
            raise ValueError("enable_prefix_caching=True is not allowed with computed requests")
        (params,) = params_per_prompt(sampling_params, 1, sampling)
        return self.transactions.call(self._add_computed, token_ids, params)

    def _add_computed(self, token_ids: list[int], params: SamplingParams) -> int:
        with self.transactions.changing():
            seq = self._make_sequence(list(token_ids), params, self.unclaimed)
            if self.scheduler.add_computed(seq):
                self.requests[seq.request_id] = seq
                return seq.request_id
        raise ValueError(f"a computed request of {len(token_ids)} tokens has no room")

    def step(self) -> list[RequestOutput]:
        """Runs one step of the batch; returns what has finished of `add_request`.

        Requests of a `generate` in another thread take part and go to that call. If it raises,
        nothing is lost: the next call goes on, or says that the engine has exited.
        """
        outputs: dict[int, Completion] = {}
        try:
            self.transactions.call(self._step)
            self.transactions.give_way()
            self.transactions.call(self._claim, outputs)
            return [RequestOutput(request_id=i, **output) for i, output in outputs.items()]
        except BaseException:
            self.unclaimed.update(outputs)  # the caller did not get them
            raise

    def _claim(self, outputs: dict[int, Completion]) -> None:
        outputs.update(self.unclaimed)
        self.unclaimed.clear()

    def is_finished(self) -> bool:
        """Whether no request is waiting or running, and none has finished unseen."""
        return not self.requests and not self.unclaimed

    def abort(self, request_id: int) -> bool:
        """Ends a request, from whatever thread; returns False if it has finished already.

        `step` never returns it; its `generate` returns what there is of it. Raises KeyError if
        there never was such a request.
        """
        return self.transactions.call(self._abort, request_id)

    def _abort(self, request_id: int) -> bool:
        if not 0 <= request_id < self.next_request_id:
            raise KeyError(
                f"request_id={request_id!r} is unknown: ids so far are below {self.next_request_id}"
            )
        seq = self.requests.get(request_id)
        if seq is None or seq.finish_reason is not None:
            return False
        if self.in_step:  # on this thread, by a signal handler: the next step makes all anew
            self.transactions.unfinished += 1
            seq.finish_reason = "abort"
            return True
        self._mend()
        with self.transactions.changing():
            seq.finish_reason = "abort"
            self._take_out([seq])
        return True

    def _mend(self) -> None:
        """After a change that was broken off: makes all anew but the tokens of each request."""
        if not self.transactions.unfinished:
            return
        self.in_flight = None
        try:
            self.model_runner.synchronize()
        except RuntimeError:  # the device is lost
            self.exit()
            raise
        self.scheduler.restart(self.requests.values())
        self._take_out([seq for seq in self.requests.values() if seq.finish_reason is not None])
        self.transactions.unfinished = 0

    def _step(self) -> None:
        """Runs one step; completions go where their requests say."""
        self.transactions.check_open()
        self._mend()
        try:
            with self.transactions.changing(), self.model_runner.ranks.collective_region():
                self.in_step = True
                current = self.in_flight or self._launch(ahead=False)
                if current is not None:
                    self.in_flight = self._launch(ahead=True) if self._may_look_ahead() else None
                    tokens = self.model_runner.collect(current)
                    self._take_out(self.scheduler.update(current.step, tokens))
        except BaseException:
            if self.model_runner.ranks.broken:
                self.exit()
            raise
        finally:
            self.in_step = False

    def _launch(self, *, ahead: bool) -> LaunchedStep | None:
        step = self.scheduler.schedule(ahead=ahead)
        return None if step is None else self.model_runner.launch(step)

    def _may_look_ahead(self) -> bool:
        """Whether the next step may be launched before the tokens of the current one are known."""
        # When profiling, the next step overwrites the time marks.
        return self.config.async_scheduling and not self.config.pipeline_enable_profiling

    def _run(self, results: dict[int, Completion], count: int, use_tqdm: bool) -> None:
        """Steps until there are `count` results."""
        seen, tokens, start = 0, 0, time.perf_counter()
        with tqdm(total=count, desc="Generating", disable=not use_tqdm) as bar:
            while len(results) < count:
                exclusive(self.transactions.lock, self._step)
                self.transactions.give_way()
                if len(results) > seen:
                    new = list(results.values())[seen:]
                    seen = len(results)
                    tokens += sum(len(output["token_ids"]) for output in new)
                    rate = tokens / (time.perf_counter() - start)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    bar.update(len(new))

    def _drop(self, results: dict[int, Completion]) -> None:
        """Ends all requests whose completions were to go to `results`."""
        for seq in [seq for seq in self.requests.values() if seq.results is results]:
            self._abort(seq.request_id)

    def _queue(
        self, prompts: list[list[int]], params: list[SamplingParams], results: dict[int, Completion]
    ) -> list[int]:
        with self.transactions.changing():
            seqs = [
                self._make_sequence(*pair, results) for pair in zip(prompts, params, strict=True)
            ]
            for seq in seqs:
                self.requests[seq.request_id] = seq
                self.scheduler.add(seq)
            return [seq.request_id for seq in seqs]

    def _make_sequence(
        self, token_ids: list[int], params: SamplingParams, results: dict[int, Completion]
    ) -> EngineSequence:
        request_id = self.next_request_id
        self.next_request_id += 1
        stop_ids = frozenset(params.stop_token_ids)
        return EngineSequence(
            request_id=request_id,
            token_ids=token_ids,
            params=params,
            stop_ids=stop_ids if params.ignore_eos else stop_ids | self.eos_ids,
            max_len=self.max_len,
            seed=random.getrandbits(63) if params.seed is None else params.seed,
            results=results,
        )

    def _take_out(self, ended: list[EngineSequence]) -> None:
        """Hands over the completions of requests, then forgets them; may be repeated."""
        for seq in ended:
            if seq.finish_reason == "abort":
                self.scheduler.abort(seq)
            if seq.results is not self.unclaimed or seq.finish_reason != "abort":
                seq.results[seq.request_id] = self._output(seq)
            self.requests.pop(seq.request_id, None)

    def _output(self, seq: EngineSequence) -> Completion:
        token_ids, reason = seq.token_ids[seq.prompt_len :], seq.finish_reason
        assert reason is not None
        if reason == "error":
            logger.warning("Request %d ends in error: its logits are not numbers", seq.request_id)
        try:
            text = self.texts.decode(token_ids)
        except Exception as error:  # of the tokenizer, which comes with the checkpoint
            logger.warning("Request %d: its text cannot be decoded: %r", seq.request_id, error)
            text, reason = "", "error"
        return Completion(text=text, token_ids=token_ids, finish_reason=reason)


def _start_runner(config: Config, directory: Path) -> ModelRunner:
    """The runner of rank 0, all ranks ready; other ranks serve it and never return."""
    device = resolve_device(config.device)
    ranks = Ranks.start(config, directory, device)
    try:
        with ranks.collective_region():
            runner = ModelRunner(config, directory, device, ranks)
            if not ranks.is_first:
                runner.serve()
    except BaseException:
        ranks.close()
        raise
    if not ranks.is_first:
        runner.close()
        raise SystemExit(0)
    return runner
