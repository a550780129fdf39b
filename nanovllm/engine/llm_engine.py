"""The engine: takes requests, runs steps until they are finished, gives back text.

    with LLMEngine("path/to/Qwen3-0.6B") as engine:
        outputs = engine.generate(["Hello, world!"], max_tokens=50)

request -> Scheduler (which tokens next?) -> ModelRunner (compute them) -> Scheduler (what now?)
-> RequestMaker (the completion, whose text a Detokenizer may have made on the way)

Inside ModelRunner: StepRunner (by which plan, in which graph) -> PipelineScheduler (the model's
stages on their lanes) -> Sampler (draw).
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from operator import itemgetter
from typing import Any, Literal, overload

from typing_extensions import Self, Unpack

from nanovllm.config import Config, ConfigOptions
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.conversations import Conversation, list_conversations
from nanovllm.engine.model_runner import LaunchedStep, start_runner
from nanovllm.engine.outputs import Completion, Delta, DeltaMaker, RequestOutput, progress_bar
from nanovllm.engine.prompts import Prompt, Prompts, TextProcessor, name_prompts
from nanovllm.engine.requests import CheckedCall, RequestMaker
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.engine.transactions import Transactions
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models import load_config
from nanovllm.models.generation_defaults import sampling_defaults
from nanovllm.sampling_params import SamplingOptions, SamplingParams
from nanovllm.structured.grammars import Grammars
from nanovllm.utils.garbage import few_full_collections
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.locks import exclusive
from nanovllm.utils.options import short, taking, whole
from nanovllm.utils.tokenizer import load_tokenizer


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
        defaults = sampling_defaults(directory, config.generation_config)
        self.tokenizer = load_tokenizer(directory)
        self.model_runner = runner = start_runner(config, directory)
        self.transactions = Transactions()
        # Closes at garbage collection or interpreter exit at the latest, without keeping us alive.
        self._finalizer = weakref.finalize(self, self.transactions.call_at_exit, runner.close)
        limits = {
            "max_model_len": runner.max_model_len,
            "the KV cache, all of its blocks together,": runner.capacity,
        }
        vocab_size = runner.model_config.vocab_size
        self.texts = TextProcessor(config.model, self.tokenizer, vocab_size, limits)
        # From config.json, generation_config.json and the tokenizer together, if there is such a
        # token: -1 may stand for none.
        own = getattr(self.tokenizer, "eos_token_id", None)
        ids = {*runner.model_config.eos_token_ids, *([] if own is None else [own])}
        self.eos_ids = {token for token in ids if 0 <= token < vocab_size}
        self.grammars = Grammars(self.texts, self.eos_ids)
        self.request_maker = RequestMaker(config, self.texts, self.grammars, defaults, self.eos_ids)
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

    def __enter__(self) -> Self:
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
        self.model_runner.close()
        self._finalizer.detach()

    def get_tokenizer(self) -> Any:
        """The model's, of transformers; None if it has none."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What counts where a call does not say: see `Config.generation_config`."""
        return SamplingParams(**self.request_maker.defaults)

    @taking(SamplingParams)
    @few_full_collections()
    def generate(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Completes `prompts`, in one continuous batch with those of other threads.

        The completions are in the order of the prompts; the samples of one follow each other.

        Args:
            prompts: a text, or a list of texts or lists of token ids. `{"prompt": text}` and
                `{"prompt_token_ids": ids}`, alone or in a list, are the same.
            sampling_params: for all prompts, or one per prompt.
            use_tqdm: whether to show a progress bar.
            sampling: fields of `SamplingParams`, instead of `sampling_params`. Those that are not
                given are as the model's generation_config.json says, see `Config`.

        Raises:
            TypeError, ValueError: a prompt or option is not allowed; then none has been run.
            RuntimeError: the engine has exited, or exits meanwhile.
        """
        self.transactions.check_open()
        call = self.request_maker.check(name_prompts(prompts), sampling_params, sampling)
        count = sum(params.n for params in call.params)
        outputs = []
        with closing(self._run(call)) as completions, progress_bar(count, use_tqdm) as advance:
            for completion in completions:
                outputs.append(completion)
                advance(completion)
        return sorted(outputs, key=itemgetter("index", "sample"))

    @overload
    def stream(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        deltas: Literal[False] = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Completion, None, None]: ...
    @overload
    def stream(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        deltas: Literal[True],
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Delta, None, None]: ...
    @taking(SamplingParams)
    def stream(
        self,
        prompts: Prompts,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        deltas: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Generator[Any, None, None]:
        """Completes `prompts` as `generate` does, and yields each completion when it has ended.

        Requests are queued at the first `next`, and run only while you wait in `next` or another
        thread steps. Closing or dropping the generator, as leaving a `for` loop does, aborts what
        has not ended.

        Args:
            deltas: yield what is new of each text after every step instead. What may become a stop
                text, and characters that are not complete, come with a later delta; the last one of
                each completion has its `finish_reason`.

        The other arguments, and the errors, are those of `generate`.
        """
        self.transactions.check_open()
        named = name_prompts(prompts)
        return self._run(self.request_maker.check(named, sampling_params, sampling, deltas))

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
        template = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "chat_template_kwargs": chat_template_kwargs,
        }
        ids = [
            self.texts.encode_chat(conversation, f"messages[{i}]", **template)
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

        With n samples it is the first one's id; the others follow.

        Raises:
            TypeError, ValueError: the prompt or an option is not allowed.
        """
        self.transactions.check_open()
        call = self.request_maker.check({"prompt": prompt}, sampling_params, sampling)
        first, *_ = self.transactions.change(self._queue, call, self.unclaimed)
        return first.request_id

    @taking(SamplingParams)
    def add_computed_request(
        self,
        token_ids: list[int],
        sampling_params: SamplingParams | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> int:
        """Adds a request that decodes at once: all its tokens but the last count as computed.

        For benchmarks: its KV blocks hold whatever they held.

        Raises:
            TypeError, ValueError: an argument is not allowed, there is no room for it, or the
                engine caches prefixes, and so would hand on what was never computed.
        """
        if self.config.enable_prefix_caching:
            raise ValueError("enable_prefix_caching=True is not allowed with computed requests")
        call = self.request_maker.check({"prompt": token_ids}, sampling_params, sampling)
        for name, allowed in (("n", 1), ("prompt_logprobs", None)):
            asked = getattr(call.params[0], name)
            if asked != allowed:
                raise ValueError(
                    f"{name}={asked} is not allowed with computed requests: it must be {allowed}"
                )
        return self.transactions.change(self._add_computed, call)

    def _add_computed(self, call: CheckedCall) -> int:
        with self.transactions.changing():
            (seq,) = self._make_sequences(call, self.unclaimed)
            if self.scheduler.add_computed(seq):
                self.requests[seq.request_id] = seq
                return seq.request_id
        raise ValueError(f"a computed request of {seq.prompt_len} tokens has no room")

    def step(self) -> list[RequestOutput]:
        """Runs one step of the batch; returns what has finished of `add_request`.

        Requests of a `generate` in another thread take part and go to that call. If it raises,
        nothing is lost: the next call goes on, or says that the engine has exited.
        """
        outputs: dict[int, Completion] = {}
        try:
            self.transactions.change(self._step)
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

        `step` never returns it; its `generate` returns the part so far. Raises KeyError if
        there never was such a request.
        """
        within = self.transactions.is_within
        return self.transactions.call(self._abort, request_id, within)

    def _abort(self, request_id: int, within: bool) -> bool:
        found = whole(request_id)
        if found is None or not 0 <= found < self.next_request_id:
            raise KeyError(
                f"request_id={short(request_id)} is unknown: ids so far are below "
                f"{self.next_request_id}"
            )
        seq = self.requests.get(found)
        if seq is None or seq.finish_reason is not None:
            return False
        if within:  # in the middle of a change: the next step makes all anew
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
        found = self.transactions.unfinished
        if not found:
            return
        self.in_flight = None
        try:
            self.model_runner.synchronize()
        except RuntimeError:  # the device is lost
            self.exit()
            raise
        self.scheduler.restart(self.requests.values())
        self._take_out([seq for seq in self.requests.values() if seq.finish_reason is not None])
        self.transactions.unfinished -= found

    def _step(self) -> None:
        """Runs one step; completions go where their requests say."""
        self.transactions.check_open()
        self._mend()
        try:
            with self.transactions.changing(), self.model_runner.ranks.collective_region():
                current = self.in_flight or self._launch(ahead=False)
                if current is not None:
                    self.in_flight = self._launch(ahead=True) if self._may_look_ahead() else None
                    tokens = self.model_runner.collect(current)
                    self._take_out(self.scheduler.update(current.step, tokens))
        except BaseException as error:
            if isinstance(error, Exception):
                self.transactions.check_open()  # what a signal handler closed fails in many ways
            if self.model_runner.ranks.broken:
                self.exit()
            raise

    def _launch(self, *, ahead: bool) -> LaunchedStep | None:
        step = self.scheduler.schedule(ahead=ahead)
        if step is None:
            return None
        return self.model_runner.launch(step, self.grammars.masks(step))

    def _may_look_ahead(self) -> bool:
        """Whether the next step may be launched before the tokens of the current one are known."""
        # When profiling, the next step overwrites the time marks.
        return self.config.async_scheduling and not self.config.pipeline_enable_profiling

    def _run(self, call: CheckedCall) -> Generator[Any, None, None]:
        """Queues requests and steps until they have ended; yields completions, or all deltas."""
        results: dict[int, Completion] = {}
        try:
            seqs = self.transactions.change(self._queue, call, results)
            left = {seq.request_id: DeltaMaker(seq) if call.deltas else None for seq in seqs}
            while left:
                self.transactions.check_outside()
                exclusive(self.transactions.lock, self._step)
                self.transactions.give_way()
                if call.deltas:
                    yield from filter(None, [maker.next() for maker in left.values() if maker])
                for request_id in list(results):
                    completion = results.pop(request_id)
                    if request_id in left:  # else it was handed over once before an error
                        maker = left.pop(request_id)
                        yield completion if maker is None else maker.last(completion)
        finally:
            # However it ends, nothing of it stays behind.
            if self.transactions.is_own_process():
                self.transactions.call(self._drop, results, self.transactions.is_within)

    def _drop(self, results: dict[int, Completion], within: bool) -> None:
        """Ends all requests whose completions were to go to `results`."""
        for seq in [seq for seq in self.requests.values() if seq.results is results]:
            self._abort(seq.request_id, within)

    def _queue(self, call: CheckedCall, results: dict[int, Completion]) -> list[EngineSequence]:
        with self.transactions.changing():
            seqs = self._make_sequences(call, results)
            for seq in seqs:
                self.requests[seq.request_id] = seq
                self.scheduler.add(seq)
            return seqs

    def _make_sequences(
        self, call: CheckedCall, results: dict[int, Completion]
    ) -> list[EngineSequence]:
        seqs = self.request_maker.sequences(self.next_request_id, call, results)
        self.next_request_id += len(seqs)
        return seqs

    def _take_out(self, ended: list[EngineSequence]) -> None:
        """Hands over the completions of requests, then forgets them; may be repeated."""
        for seq in ended:
            if seq.finish_reason == "abort":
                self.scheduler.abort(seq)
            if seq.results is not self.unclaimed or seq.finish_reason != "abort":
                seq.results[seq.request_id] = self.request_maker.completion(seq)
            self.requests.pop(seq.request_id, None)
