"""Runs steps on one rank: inputs to the device, the model (or its graph), logits, tokens.

- rank 0: `launch` issues a step, from the scheduled step to drawn tokens; `collect` waits
- other ranks: `serve` runs what rank 0 sends until it stops

CUDA graphs are captured in step_runner.py; graph_memory.py has their buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.auto.calibration import Calibration, calibration_key
from nanovllm.engine.auto.chooser import AutoChooser, plans_to_try
from nanovllm.engine.auto.step_timer import device_timer
from nanovllm.engine.draws import Draws, Sampler
from nanovllm.engine.graph_memory import GraphMemory, batch_sizes
from nanovllm.engine.parallel.processes import RankDiedError
from nanovllm.engine.parallel.ranks import LOAD_SECONDS, Ranks
from nanovllm.engine.pipeline_modes import build_pipelines
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.plan import SEQUENTIAL, Plan
from nanovllm.engine.scheduler import Chunk, Step
from nanovllm.engine.scoring import Scoring
from nanovllm.engine.step_inputs import StepInputs, dummy_chunk
from nanovllm.engine.step_runner import FixedChooser, PreparedStep, StepRunner
from nanovllm.engine.warm_up import SAMPLING, warm_up
from nanovllm.layers.attention import make_backend
from nanovllm.layers.logit_edits import RequestEdits
from nanovllm.layers.logprobs import Scores
from nanovllm.models import Checkpoint, load_config, load_model
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.device import (
    resolve_device,
    resolve_dtype,
    single_thread,
    sm_count,
    without_autocast,
)
from nanovllm.utils.garbage import few_full_collections
from nanovllm.utils.timeline import save_timeline

# On the CPU, operations of such a model are too short to be divided among threads.
SMALL_HIDDEN_SIZE = 256


@dataclass(frozen=True)
class LaunchedStep:
    """A step that has been issued; tokens [S] and scores are on the host once `done` has happened.

    `scoring` says whose the scores are; None: there are none.
    """

    step: Step
    prepared: PreparedStep
    scoring: Scoring | None
    tokens: torch.Tensor
    scores: Scores | None
    done: torch.cuda.Event | None


def ignore(moment: str, step: Step) -> None:
    """Watches nothing; see `ModelRunner.watch`."""


class ModelRunner:
    """Owns model, KV cache and step runner of one rank.

    Attributes:
        watch: called on rank 0 at four moments of every step: "begin" before its work is issued,
            "issued" after the model's, "end" after all of it, "tokens" once these are on the host.
    """

    @torch.inference_mode()
    def __init__(self, config: Config, model_dir: Path, device: torch.device, ranks: Ranks) -> None:
        self.config = config
        self.device = device
        self.device_sms = sm_count(device)
        self.ranks = ranks
        self.block_size = config.kvcache_block_size
        self.model_config = load_config(model_dir)
        is_small = self.model_config.hidden_size <= SMALL_HIDDEN_SIZE
        self.threads = single_thread if device.type == "cpu" and is_small else nullcontext
        self._set_device()
        checkpoint = None if config.load_format == "dummy" else Checkpoint.open(model_dir)
        stored_dtype = "float32" if checkpoint is None else checkpoint.dtype
        dtype = resolve_dtype(config.dtype, self.model_config.dtype or stored_dtype, device)
        ranks.connect(config, dtype, self.model_config.hidden_size)
        heads = self.model_config.rank_heads(ranks.group)
        self.backend = make_backend(
            config.attention_backend, heads, device, self.block_size, config.enforce_eager
        )
        self.max_model_len = min(config.max_model_len, self.model_config.usable_length)
        self.model = load_model(
            self.model_config, checkpoint, self.backend, ranks.group, device, dtype,
            max_length=self.max_model_len, show_progress=ranks.is_first,
            on_tensor=ranks.workers.check,
        )  # fmt: skip
        ranks.minimum(0)  # no kernel shall wait for a rank that still loads
        max_blocks = -(-self.max_model_len // self.block_size)
        self.inputs = StepInputs(self.block_size, max_blocks, self.backend)
        self.last_tokens = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device)
        self.sampler = Sampler(
            self.model.compute_logits, self.last_tokens, self.max_model_len, ranks.group,
            self.model.vocab_shard,
        )  # fmt: skip
        self.graph_memory: GraphMemory | None = None
        self._bind_cache(0, dtype)  # for the measurement: the padding block alone
        self.step_runner = self.make_step_runner(config, SEQUENTIAL)
        block_bytes = self.model.kv_cache.nbytes
        num_blocks = kv_cache.count_blocks(
            config, block_bytes, self.max_model_len, device, self._run_largest_step
        )
        self.num_blocks = ranks.minimum(num_blocks)
        self._bind_cache(self.num_blocks, dtype)
        self.graph_memory = self._make_graph_memory(dtype)
        self.step_runner = self.make_step_runner(config)
        self.watch: Callable[[str, Step], None] = ignore
        self.statistics = self.step_runner.statistics
        self.closed = False
        try:
            ranks.check_equal([scheduler.plan for scheduler in self.step_runner.schedulers])
            if device.type == "cuda":
                longest = min(config.max_num_batched_tokens, self.max_model_len)
                logits = warm_up(self.step_runner, config, longest)
                for params in SAMPLING:
                    self._try_to_draw(logits, params)
            if ranks.is_first:  # whose steps the others serve from now on
                self.step_runner.chooser.capture(self.step_runner, show_progress=True)
        except BaseException:
            self.step_runner.close()
            raise

    def close(self) -> None:
        """Frees the device's memory and ends the other ranks; may be called twice."""
        if self.closed:
            return
        try:
            if not self.ranks.broken:
                try:
                    self.synchronize()  # a step launched ahead may still run
                except RankDiedError:
                    self.ranks.break_off()  # or it might run for ever
            self.step_runner.close()
        except RuntimeError:  # of a device that is lost: no rank shall be left behind
            self.ranks.break_off()
            self.ranks.close()
            raise
        self.ranks.close()
        self.closed = True  # only now, so that a close that was interrupted can be repeated
        # The device's memory goes with the last references to it.
        del self.model, self.sampler, self.step_runner, self.graph_memory
        if self.device.type == "cuda":
            # cuBLAS keeps a workspace for every stream it has seen, also for those now closed.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    @property
    def capacity(self) -> int:
        """Tokens that all KV blocks together hold."""
        return self.num_blocks * self.block_size

    @property
    def pipeline_scheduler(self) -> PipelineScheduler:
        """The pipeline's, or sequential decode's if there is none."""
        return self.step_runner.schedulers[min(1, len(self.step_runner.schedulers) - 1)]

    def get_pipeline_statistics(self) -> dict[str, object]:
        """See `PipelineStatistics.as_dict`."""
        return self.statistics.as_dict()

    def print_pipeline_statistics(self) -> None:
        """Prints tokens and steps by path, and mean times if they were profiled."""
        print(self.statistics.format())

    def save_timeline(self, path: str) -> None:
        """Writes the stages of the last profiled decode steps to `path`; see utils/timeline.py."""
        save_timeline(list(self.statistics.recent), path)

    def synchronize(self, seconds: float | None = None) -> None:
        """Waits for all that was launched; RankDiedError after silence, see `Ranks.wait`."""
        if self.device.type == "cuda":
            self._set_device()
            event = torch.cuda.Event()
            event.record()
            self.ranks.wait(event, seconds)
            torch.cuda.synchronize(self.device)

    def _set_device(self) -> None:
        """Makes the device the current one, which is each thread's own."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def use(self, step_runner: StepRunner, chooser: FixedChooser | None = None) -> None:
        """Runs the next steps by a runner of `make_step_runner`; none may be in flight."""
        self.synchronize()
        self.step_runner, self.statistics = step_runner, step_runner.statistics
        if chooser is not None:
            step_runner.chooser = chooser

    def launch(self, step: Step, masks: Mapping[int, np.ndarray] | None = None) -> LaunchedStep:
        """Issues `step` on all ranks, without waiting for it.

        Rows of its logits that have a mask draw from the tokens that it allows, see `Sampler.pack`.
        """
        self._set_device()
        with torch.inference_mode(), self.threads(), without_autocast(self.device):
            scoring = Scoring.of(step, self.model_config.vocab_size) if step.asks else None
            draws = self.sampler.pack(step, masks or {}, scoring)
            prepared = replace(self.step_runner.prepare(step), draws=draws)
            self._send(prepared)
            self.watch("begin", step)
            logits, hidden = self.step_runner.run(prepared)
            self.watch("issued", step)
            drawn = self.sampler.draw(logits, draws, hidden)
            launched = LaunchedStep(step, prepared, scoring, *self._to_host(*drawn))
            self.watch("end", step)
            return launched

    def collect(self, launched: LaunchedStep) -> list[int]:
        """Waits for a step and notes its scores with their requests.

        Returns the drawn tokens, one per sampling chunk.
        """
        self._set_device()
        if launched.done is not None:
            self.ranks.wait(launched.done)
        self.watch("tokens", launched.step)
        self.ranks.check_silence(launched.tokens)
        if launched.step.is_decode:
            self.step_runner.finish(launched.prepared, len(launched.step.chunks))
        if launched.scoring is not None and launched.scores is not None:
            launched.scoring.hand_out(launched.scores)
        return launched.tokens.tolist()

    @few_full_collections()
    @torch.inference_mode()
    def serve(self) -> None:
        """Runs the steps that rank 0 sends, and draws the same tokens, until it stops."""
        while (received := self.ranks.receive_step()) is not None:
            layout, flat, parts = received
            inputs, draws = torch.from_numpy(flat), Draws(*parts)
            if self.device.type == "cuda":
                inputs = inputs.pin_memory()  # or the copy could wait for the steps before
            with self.threads():
                logits, hidden = self.step_runner.run(PreparedStep(layout, inputs, draws))
                self.sampler.draw(logits, draws, hidden)
            self.ranks.watch_step()

    def _try_to_draw(self, logits: torch.Tensor, params: SamplingParams) -> None:
        """Draws the token of one row, and waits for it."""
        seq, vocab_size = dummy_chunk(0, 1).seq, self.model_config.vocab_size
        seq = replace(seq, params=params, edits=RequestEdits.of(params, (), vocab_size))
        seq.num_pending = 1
        step = Step(True, [Chunk(seq, 0, 1, needs_sample=True)], asks=seq.asks)
        draws = self.sampler.pack(step, {}, Scoring.of(step, vocab_size))
        tokens, _, done = self._to_host(*self.sampler.draw(logits, draws))
        if done is not None:
            self.ranks.wait(done)
        self.ranks.check_silence(tokens)

    def _to_host(
        self, tokens: torch.Tensor, scores: Scores | None
    ) -> tuple[torch.Tensor, Scores | None, torch.cuda.Event | None]:
        """The same on the host, valid after the event."""
        if self.device.type != "cuda":
            return tokens, scores, None
        if len(tokens):
            tokens = _copy_to_host(self.ranks.mark_silence(tokens))
        if scores is not None:
            scores = Scores(*map(_copy_to_host, scores))
        # Also of a step without tokens: a queue of those is not one silent step.
        done = torch.cuda.Event()
        done.record()
        return tokens, scores, done

    def _bind_cache(self, num_blocks: int, dtype: torch.dtype) -> None:
        """Gives the model a KV cache of so many blocks beside the padding block."""
        layers, heads = self.model_config.num_hidden_layers, self.backend.heads
        cache = kv_cache.allocate(layers, num_blocks, self.block_size, heads, dtype, self.device)
        self.model.bind_kv_cache(cache)

    def make_step_runner(self, config: Config, plan: Plan | None = None) -> StepRunner:
        """Runs steps of this model as `config` says, or decode by `plan`; the caller closes it."""
        is_auto = plan is None and config.enable_pipeline and config.pipeline_mode == "auto"
        built = build_pipelines(
            config, self.model, self.device, self.device_sms, plan,
            plans_to_try(self.device_sms) if is_auto else (),
        )  # fmt: skip
        runner = StepRunner(
            config, built, self.last_tokens, self.graph_memory, self.inputs, self._send
        )
        if is_auto and len(built.schedulers) > 1 and self.ranks.is_first:
            try:
                runner.chooser = AutoChooser(runner, self._calibration(config, runner))
            except BaseException:
                runner.close()
                raise
        return runner

    def _send(self, step: PreparedStep) -> None:
        """Gives a step to the other ranks, if this is the first."""
        if self.ranks.is_first:
            self.ranks.send_step(step.layout, step.flat.numpy(), step.draws)

    def _calibration(self, config: Config, runner: StepRunner) -> Calibration:
        cache = self.model.kv_cache
        return Calibration(
            device_timer(runner, cache, self.num_blocks, self.block_size, self.ranks.wait),
            config.max_num_seqs,
            self.capacity,
            self.max_model_len,
            calibration_key(
                self.model_config,
                self.device,
                dtype=str(cache.dtype),
                block_size=self.block_size,
                backend=type(self.backend).__name__,
                ranks=self.ranks.group.size,
                all_reduce=config.all_reduce,
            ),
        )

    def _make_graph_memory(self, dtype: torch.dtype) -> GraphMemory | None:
        if self.device.type != "cuda" or self.config.enforce_eager:
            return None
        sizes = batch_sizes(self.config.max_num_seqs)
        # With a row in each micro-batch inputs take more room than under any plan.
        layout = self.inputs.decode_layout(0, sizes[-1], micro_batches=sizes[-1])
        width = self.model.vocab_shard.size
        # Other ranks may still compile what they need for a capture.
        wait = partial(self.synchronize, LOAD_SECONDS)
        return GraphMemory(sizes, layout.size, width, dtype, self.device, wait)

    def _run_largest_step(self) -> None:
        """Prefill as large as the options allow, in the padding block, and decode's own memory."""
        tokens, longest = self.config.max_num_batched_tokens, self.max_model_len
        sizes = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        chunks = [dummy_chunk(0, size) for size in sizes[: self.config.max_num_seqs]]
        self.step_runner.run(self.step_runner.prepare_prompts(chunks))
        # What decode needs at most beyond that: logits, a copy of those that are drawn from, and
        # room for the graphs' own memory.
        shape = self.config.max_num_seqs, self.model.vocab_shard.size
        torch.zeros(shape, device=self.device).softmax(-1)
        self.synchronize(LOAD_SECONDS)


def _copy_to_host(x: torch.Tensor) -> torch.Tensor:
    """A copy, complete once the current stream reaches this point."""
    host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    return host.copy_(x, non_blocking=True)


def start_runner(config: Config, directory: Path) -> ModelRunner:
    """The runner of rank 0, all ranks ready; other ranks serve it and never return."""
    device = resolve_device(config.device)
    ranks = Ranks.start(config, directory, device)
    try:
        with ranks.collective_region(), without_autocast(device):
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
