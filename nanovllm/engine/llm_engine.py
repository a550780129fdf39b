"""The engine: takes requests, runs steps until they are finished, gives back text.

    with LLMEngine("path/to/Qwen3-0.6B") as engine:
        outputs = engine.generate(["Hello, world!"], max_tokens=50)

request -> Scheduler (which tokens next?) -> ModelRunner (compute them) -> Scheduler (what now?)
"""

from __future__ import annotations

import dataclasses
import operator
import os
import random
import time
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from tqdm import tqdm

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import LaunchedStep, ModelRunner
from nanovllm.engine.ranks import Ranks
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence as EngineSequence
from nanovllm.layers.parallel import ParallelGroup
from nanovllm.models.qwen3 import rank_heads
from nanovllm.models.qwen3_config import Qwen3Config
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.hub import resolve_model
from nanovllm.utils.options import check_names
from nanovllm.utils.tokenizer import load_tokenizer

Prompt = str | Sequence[int]


class Completion(TypedDict):
    """What `generate` returns for a prompt; `finish_reason` is "stop" or "length"."""

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
        TypeError: an option does not exist.
        ValueError: an option's value is not allowed, or the model is not supported.
        FileNotFoundError: the model is not there.
        ImportError: the attention back end's package is not installed.
        MemoryError: no KV block fits.
        RankDiedError: another rank ended.
        PipelineUnavailable, GreenContextError: there is no pipeline, with `pipeline_strict`.

    NOTE: under torchrun the ranks above 0 serve rank 0 from within this constructor; when rank 0's
    engine exits, they end with SystemExit(0). The rest of the script runs on rank 0 alone.
    """

    def __init__(self, model: str | Config | None = None, **options: Any) -> None:
        if isinstance(model, Config):
            check_names(Config, options)
            self.config = dataclasses.replace(model, **options) if options else model
        else:
            self.config = Config(**options) if model is None else Config(model, **options)
        directory = resolve_model(self.config.model)
        # Before anything else is read, and before other processes start and all stumble over it.
        tensor_parallel_size = self.config.tensor_parallel_size
        rank_heads(Qwen3Config.from_directory(directory), ParallelGroup(size=tensor_parallel_size))
        self.tokenizer = load_tokenizer(directory)
        device = resolve_device(self.config.device)
        if dist.is_torchelastic_launched() and tensor_parallel_size > 1:
            ranks = Ranks.join_torchrun(self.config, device)
        else:
            ranks = Ranks.spawn(self.config, directory, device)
        try:
            with ranks.in_step():
                runner = ModelRunner(self.config, directory, device, ranks)
                if not ranks.is_first:
                    runner.serve()
        except BaseException:
            ranks.close()
            raise
        if not ranks.is_first:
            runner.close()
            raise SystemExit(0)
        self.model_runner = runner
        # Closes at garbage collection or interpreter exit at the latest, without keeping us alive.
        self._close = weakref.finalize(self, runner.close)
        blocks = BlockManager(
            runner.num_blocks, self.config.kvcache_block_size, self.config.enable_prefix_caching
        )
        self.scheduler = Scheduler(
            blocks, self.config.max_num_seqs, self.config.max_num_batched_tokens
        )
        self.in_flight: LaunchedStep | None = None
        self.requests: dict[int, EngineSequence] = {}
        # Of requests that were added before a `generate` and finished while it ran.
        self.unclaimed: list[RequestOutput] = []
        self.next_request_id = 0
        self.eos_ids = self._find_eos_ids()

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.exit()

    def exit(self) -> None:
        """Ends the worker processes and frees the device's memory; may be called twice."""
        self._close()

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **sampling: Any,
    ) -> list[Completion]:
        """Completes `prompts`, all of them in one continuous batch.

        Args:
            prompts: a text, or a list of texts or lists of token ids.
            sampling_params: for all prompts, or one per prompt.
            use_tqdm: whether to show a progress bar.
            sampling: fields of `SamplingParams`, instead of `sampling_params`.

        Returns:
            One completion per prompt, in order.

        Raises:
            TypeError, ValueError: a prompt or option is not allowed; then none has been run.
        """
        prompts = _prompt_list(prompts)
        params = _params_per_prompt(sampling_params, len(prompts), sampling)
        ids = [self._check_prompt(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
        requests = [self._queue(*pair) for pair in zip(ids, params, strict=True)]
        try:
            outputs = self._run(set(requests), use_tqdm)
        finally:
            # After an interrupt or an error, nothing of this call stays behind.
            for request_id in requests:
                self.abort(request_id)
        return [
            Completion(
                text=outputs[i]["text"],
                token_ids=outputs[i]["token_ids"],
                finish_reason=outputs[i]["finish_reason"],
            )
            for i in requests
        ]

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        **sampling: Any,
    ) -> int:
        """Queues one prompt and returns its request id; `step` will return its completion.

        Raises:
            TypeError, ValueError: the prompt or an option is not allowed, or the prompt can never
                fit; other requests are not affected.
        """
        (params,) = _params_per_prompt(sampling_params, 1, sampling)
        return self._queue(self._check_prompt(prompt, "prompt"), params)

    def step(self) -> list[RequestOutput]:
        """Runs one step of the batch; returns the requests that finished with it.

        Those that have finished within a call of `generate`, but are not its own, come first.
        With `async_scheduling` the step after it is already launched when its tokens arrive.
        """
        outputs = [*self.unclaimed, *self._advance()]
        self.unclaimed = []
        return outputs

    def is_finished(self) -> bool:
        """Whether no request is waiting or running, and none has finished unseen."""
        return not self.requests and not self.unclaimed

    def _advance(self) -> list[RequestOutput]:
        self._check_open()
        try:
            with self.model_runner.ranks.in_step():
                current = self.in_flight or self._launch(ahead=False)
                if current is None:
                    return []
                self.in_flight = self._launch(ahead=True) if self._may_look_ahead() else None
                tokens = self.model_runner.collect(current)
        except BaseException:
            self.in_flight = None
            self.scheduler.forget_plans()
            if self.model_runner.ranks.parted:
                self.exit()
            raise
        return [self._output(seq) for seq in self.scheduler.update(current.step, tokens)]

    def _launch(self, *, ahead: bool) -> LaunchedStep | None:
        step = self.scheduler.schedule(ahead=ahead)
        return None if step is None else self.model_runner.launch(step)

    def _may_look_ahead(self) -> bool:
        """Whether the next step may be launched before the tokens of the current one are known.

        Not while profiling: the next step overwrites the time marks. Not with several ranks: only
        rank 0 draws tokens, so the others get them from its host.
        """
        config = self.config
        return (
            config.async_scheduling
            and not config.pipeline_enable_profiling
            and config.tensor_parallel_size == 1
        )

    def abort(self, request_id: int) -> bool:
        """Drops a request; returns False if it has finished already.

        Raises:
            KeyError: there never was such a request.
        """
        if not 0 <= request_id < self.next_request_id:
            raise KeyError(
                f"request_id={request_id!r} is unknown: ids so far are below {self.next_request_id}"
            )
        seq = self.requests.pop(request_id, None)
        if seq is None:
            return False
        self.scheduler.abort(seq)
        return True

    def _run(self, unfinished: set[int], use_tqdm: bool) -> dict[int, RequestOutput]:
        """Steps until all requests of the set are finished."""
        outputs: dict[int, RequestOutput] = {}
        total_tokens, start = 0, time.perf_counter()
        with tqdm(total=len(unfinished), desc="Generating", disable=not use_tqdm) as bar:
            while unfinished:
                for output in self._advance():
                    if output["request_id"] not in unfinished:
                        self.unclaimed.append(output)
                        continue
                    unfinished.discard(output["request_id"])
                    outputs[output["request_id"]] = output
                    total_tokens += len(output["token_ids"])
                    rate = total_tokens / (time.perf_counter() - start)
                    bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
                    bar.update()
        return outputs

    def _queue(self, token_ids: list[int], params: SamplingParams) -> int:
        request_id = self.next_request_id
        self.next_request_id += 1
        seq = EngineSequence(
            request_id=request_id,
            token_ids=token_ids,
            params=params,
            stop_ids=frozenset(params.stop_token_ids).union(
                () if params.ignore_eos else self.eos_ids
            ),
            max_len=min(self.model_runner.max_model_len, self.model_runner.capacity),
            seed=random.getrandbits(63) if params.seed is None else params.seed,
        )
        self.requests[request_id] = seq
        self.scheduler.add(seq)
        return request_id

    def _output(self, seq: EngineSequence) -> RequestOutput:
        del self.requests[seq.request_id]
        token_ids = seq.token_ids[seq.prompt_len :]
        assert seq.finish_reason is not None
        return RequestOutput(
            request_id=seq.request_id,
            text=self._decode(token_ids),
            token_ids=token_ids,
            finish_reason=seq.finish_reason,
        )

    def _decode(self, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    def _check_prompt(self, prompt: Prompt, name: str) -> list[int]:
        """The token ids of a prompt that this engine can run."""
        self._check_open()
        token_ids = self._tokenize(prompt, name)
        limits = {
            "max_model_len": self.model_runner.max_model_len,
            "the KV cache, all of its blocks together,": self.model_runner.capacity,
        }
        if not token_ids:
            raise ValueError(f"{name} is empty: it must have at least one token")
        for limit, tokens in limits.items():
            if len(token_ids) > tokens:
                raise ValueError(f"{name} has {len(token_ids)} tokens, but {limit} allows {tokens}")
        vocab_size = self.model_runner.model_config.vocab_size
        if not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
            bad = next(token for token in token_ids if not 0 <= token < vocab_size)
            raise ValueError(
                f"{name} holds token id {bad}, which is outside the vocabulary: ids are from 0 "
                f"to {vocab_size - 1}"
            )
        return token_ids

    def _tokenize(self, prompt: Prompt, name: str) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{name} is a text, but model={self.config.model!r} has no tokenizer: give "
                    "token ids"
                )
            return list(self.tokenizer.encode(prompt))
        try:
            if isinstance(prompt, Iterable) and not isinstance(prompt, (bytes, bytearray)):
                tokens = list(prompt)
                # A call per token would keep the GPU waiting for a long prompt.
                only_ints = set(map(type, tokens)) == {int}
                return tokens if only_ints else [_token_id(token) for token in tokens]
        except TypeError:
            pass  # the error below says what is wrong
        raise TypeError(f"{name}={prompt!r:.80} is neither a text nor a list of token ids")

    def _find_eos_ids(self) -> frozenset[int]:
        """From config.json, generation_config.json and the tokenizer together."""
        ids = set(self.model_runner.model_config.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            ids.add(self.tokenizer.eos_token_id)
        return frozenset(ids)

    def _check_open(self) -> None:
        if not self._close.alive:
            raise RuntimeError("this engine has exited; make a new one")


def resolve_device(wanted: str) -> torch.device:
    """The device that option `wanted` means; under torchrun "cuda" is this rank's own.

    Raises:
        ValueError: CUDA is wanted, but not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={wanted!r} is not allowed: this machine has no usable CUDA GPU")
    if wanted == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device(wanted)


def _prompt_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Iterable) and not isinstance(prompts, (bytes, bytearray)):
        return list(prompts)
    raise TypeError(f"prompts={prompts!r:.80} is neither a text nor a list of prompts")


def _token_id(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError("True and False are no token ids")
    return operator.index(value)


def _params_per_prompt(
    given: SamplingParams | Sequence[SamplingParams] | None, count: int, fields: dict[str, Any]
) -> list[SamplingParams]:
    """One `SamplingParams` for each of `count` prompts."""
    if fields and given is not None:
        raise TypeError(
            f"give either sampling_params or single options ({', '.join(fields)}), not both"
        )
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams(**fields)] * count
    if not isinstance(given, Iterable):
        raise TypeError(f"sampling_params={given!r} is neither a SamplingParams nor a list of them")
    params = list(given)
    for item in params:
        if not isinstance(item, SamplingParams):
            raise TypeError(f"sampling_params holds {item!r}, which is no SamplingParams")
    if len(params) != count:
        raise ValueError(
            f"sampling_params has {len(params)} entries for {count} prompts: give one, or one each"
        )
    return params
