"""Runs steps on one rank: inputs to the device, the model (or its graph), logits, tokens.

- rank 0: `launch` issues a step, from the scheduler's plan to the drawn tokens; `collect` waits
- other ranks: `serve` runs what rank 0 sends until it stops
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine import kv_cache
from nanovllm.engine.calibration import Calibration, calibration_key
from nanovllm.engine.cuda_graphs import GraphMemory, batch_sizes
from nanovllm.engine.decode_runner import DecodeRunner, DecodeStep
from nanovllm.engine.pipeline import Pipeline, build_pipeline, sequential_pipeline
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.pipeline_statistics import PipelineStatistics
from nanovllm.engine.planned_decode import Decode, make_planned_decode, splits_to_try
from nanovllm.engine.ranks import Ranks
from nanovllm.engine.scheduler import Chunk, Step
from nanovllm.engine.step_inputs import InputLayout, fill_inputs, step_tensors
from nanovllm.engine.step_timer import DeviceTimer
from nanovllm.engine.warm_up import warm_up
from nanovllm.layers.attention_backends import make_backend
from nanovllm.layers.sampler import SamplingBatch, sample
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.models.qwen3_config import Qwen3Config
from nanovllm.models.rank_heads import rank_heads
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.loader import fill_randomly, load_weights
from nanovllm.utils.timeline import save_timeline


@dataclass(frozen=True)
class LaunchedStep:
    """A step that has been issued; `tokens` [S] are on the host once `done` has happened."""

    step: Step
    decode: DecodeStep | None
    tokens: torch.Tensor
    done: torch.cuda.Event | None


class ModelRunner:
    """Owns model, KV cache and decode paths of one rank; a context manager that closes them."""

    @torch.inference_mode()
    def __init__(self, config: Config, model_dir: Path, device: torch.device, ranks: Ranks) -> None:
        self.config = config
        self.device = device
        self.device_sms = sm_count(device)
        self.ranks = ranks
        self.block_size = config.kvcache_block_size
        self.model_config = Qwen3Config.from_directory(model_dir)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dtype = resolve_dtype(config.dtype, self.model_config.dtype, device)
        heads = rank_heads(self.model_config, ranks.group)
        self.backend = make_backend(config.attention_backend, heads, device, self.block_size)
        self.model = Qwen3ForCausalLM.allocate(
            self.model_config, self.backend, ranks.group, device, dtype
        )
        self._load(model_dir)
        self.max_model_len = min(config.max_model_len, self.model_config.max_position_embeddings)
        self.max_blocks = -(-self.max_model_len // self.block_size)
        self.last_tokens = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device)
        layers = self.model_config.num_hidden_layers

        def bind_cache(num_blocks: int) -> None:
            cache = kv_cache.allocate(layers, num_blocks, self.block_size, heads, dtype, device)
            self.model.bind_kv_cache(cache)

        bind_cache(0)  # for the measurement: the padding block alone
        block_bytes = (
            2 * layers * heads.num_kv_heads * self.block_size * heads.head_dim * dtype.itemsize
        )
        self.num_blocks = ranks.minimum(
            kv_cache.count_blocks(
                config, block_bytes, self.max_model_len, device, self._run_largest_step
            )
        )
        bind_cache(self.num_blocks)
        self.graph_memory = self._make_graph_memory(dtype)
        self.decode: Decode = self.make_decode(config)
        self.statistics = self.decode.pipeline.statistics
        self.closed = False
        try:
            if device.type == "cuda":
                self._warm_up(dtype)
            self.decode.capture(show_progress=ranks.is_first)
        except BaseException:
            self.decode.close()
            raise

    def __enter__(self) -> ModelRunner:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device's memory and ends the other ranks; may be called twice."""
        if self.closed:
            return
        if not self.ranks.parted:
            self.synchronize()  # a step launched ahead may still run
        self.decode.close()
        self.ranks.close()
        self.closed = True  # only now, so that a close that was interrupted can be repeated
        # The device's memory goes with the last references to it.
        del self.model, self.decode, self.graph_memory
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
        """Issues the stages of decode steps: as a pipeline, or in sequence where there is none."""
        return self.decode.pipeline.scheduler or self.decode.pipeline.sequential

    def get_pipeline_statistics(self) -> dict[str, object]:
        """What `print_pipeline_statistics` prints; see `PipelineStatistics.as_dict`."""
        return self.statistics.as_dict()

    def print_pipeline_statistics(self) -> None:
        """Prints tokens and steps by path, and the stages' mean times if they were profiled."""
        print(self.statistics.format())

    def save_timeline(self, path: str) -> None:
        """Writes the stages of the last profiled decode steps to `path`; see utils/timeline.py."""
        save_timeline(list(self.statistics.recent), path)

    def synchronize(self) -> None:
        """Waits for all that was launched."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def launch(self, step: Step) -> LaunchedStep:
        """Issues `step` on all ranks, without waiting for it."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # it is each thread's own
        decode: DecodeStep | None = None
        if step.is_decode:
            decode = self.decode.prepare(np.array([chunk.end for chunk in step.chunks]))
            layout, rows = decode.layout, decode.rows
        else:
            layout, rows = InputLayout.prefill(step.chunks, self.max_blocks), None
        flat = torch.empty(layout.size, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self._fill(layout, step.chunks, flat.numpy(), rows)
        self.ranks.send_step(layout, flat.numpy())
        logits = self.run(layout, flat, decode)
        return LaunchedStep(step, decode, *self._sample(step, logits))

    def collect(self, launched: LaunchedStep) -> list[int]:
        """Waits for a step; returns the drawn tokens, one per sampling chunk."""
        if launched.done is not None:
            self.ranks.wait(launched.done)
        if launched.decode is not None:
            self.decode.finish(launched.decode, len(launched.step.chunks))
        return launched.tokens.tolist()

    def serve(self) -> None:
        """Runs the steps that rank 0 sends, until it stops."""
        while (received := self.ranks.receive_step()) is not None:
            layout, flat = received
            self.run(layout, torch.from_numpy(flat))

    @torch.inference_mode()
    def run(
        self, layout: InputLayout, flat: torch.Tensor, decode: DecodeStep | None = None
    ) -> torch.Tensor:
        """Runs the model on the host's inputs; returns logits [num_samples, vocab_size].

        Args:
            layout: of `flat`.
            flat: int32 [layout.size], on the host.
            decode: on rank 0, how a decode step runs.
        """
        if layout.is_decode:
            return self.decode.run(decode or DecodeStep(layout, None), flat, self.device)
        return self._prefill(layout, flat.to(self.device, non_blocking=True))

    def _prefill(self, layout: InputLayout, flat: torch.Tensor) -> torch.Tensor:
        (inputs,) = step_tensors(layout, flat, self.last_tokens, self.backend, None)
        hidden = self.model(inputs.input_ids, inputs.positions, inputs.metadata)
        return self.model.compute_logits(hidden[inputs.sample_rows])

    @torch.inference_mode()
    def _sample(
        self, step: Step, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Draws the next token of each sampling chunk, whose logits are the first rows.

        Returns:
            The tokens on the host, valid after the event.
        """
        seqs = [chunk.seq for chunk in step.chunks if chunk.samples]
        if not seqs:
            return torch.empty(0, dtype=torch.int64), None
        batch = SamplingBatch.of(
            [seq.params for seq in seqs],
            [seq.seed for seq in seqs],
            [seq.num_generated - 1 for seq in seqs],  # the draw itself is pending already
            [seq.seat for seq in seqs],
            self.model_config.vocab_size,
            self.device,
        )
        return self._draw(logits[: len(seqs)], batch)

    def _draw(
        self, logits: torch.Tensor, batch: SamplingBatch
    ) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        """Draws a token from each row, keeps it for the next step, and sends it to the host."""
        tokens = sample(logits, batch)
        self.last_tokens[batch.seats] = tokens
        if self.device.type != "cuda":
            return tokens, None
        host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
        host.copy_(tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return host, done

    def _load(self, model_dir: Path) -> None:
        slots = dict(self.model.slots())
        if self.config.load_format == "dummy":
            fill_randomly(slots)
        else:
            load_weights(
                slots, model_dir, show_progress=self.ranks.is_first, between=self.ranks.check
            )

    def make_decode(self, config: Config) -> Decode:
        """A way to run decode steps on this model, as `config` says; the caller closes it."""
        statistics = PipelineStatistics()
        way = self._make_way(config, self._build_pipeline(config, statistics))
        is_auto = config.enable_pipeline and config.pipeline_mode == "auto"
        if not is_auto or way.pipeline.scheduler is None:
            return way
        return make_planned_decode(
            config,
            way,
            self._make_way(config, sequential_pipeline(self.model, statistics)),
            lambda split: self._make_way(config, self._build_pipeline(split, statistics)),
            self._calibration(config),
            splits_to_try(self.device_sms),
        )

    def _build_pipeline(self, config: Config, statistics: PipelineStatistics) -> Pipeline:
        return build_pipeline(
            config, self.model, self.backend, self.device, self.device_sms, statistics
        )

    def _make_way(self, config: Config, pipeline: Pipeline) -> DecodeRunner:
        return DecodeRunner(
            config,
            self.model,
            pipeline,
            self.last_tokens,
            self.backend.make_workspace(self.device, self.device_sms),
            self.graph_memory,
            self._fill_padding,
            self.max_blocks,
        )

    def _calibration(self, config: Config) -> Calibration:
        cache = self.model.kv_cache
        token_bytes = cache[:, :, 0, :, 0].nbytes
        weight_bytes = sum(weight.nbytes for weight in self.model.parameters())
        return Calibration(
            DeviceTimer(self.device, list(cache), self.num_blocks, self.block_size, self.backend),
            config.max_num_seqs,
            self.capacity,
            self.max_model_len,
            weight_bytes / token_bytes,
            calibration_key(
                self.model_config,
                self.device,
                dtype=str(cache.dtype),
                block_size=self.block_size,
                backend=type(self.backend).__name__,
            ),
        )

    def _make_graph_memory(self, dtype: torch.dtype) -> GraphMemory | None:
        if self.device.type != "cuda" or self.config.enforce_eager:
            return None
        sizes = batch_sizes(self.config.max_num_seqs)
        vocab_size = self.model_config.vocab_size
        return GraphMemory(sizes, self.max_blocks, self.backend, vocab_size, dtype, self.device)

    def _fill(
        self, layout: InputLayout, chunks: list[Chunk], flat: np.ndarray, rows: np.ndarray | None
    ) -> None:
        fill_inputs(layout, chunks, self.block_size, self.backend, flat, rows)

    def _fill_padding(self, layout: InputLayout, flat: np.ndarray) -> None:
        self._fill(layout, [], flat, None)

    def _run_largest_step(self) -> None:
        """A prefill and a decode step as large as the options allow, all in the padding block."""
        tokens, longest = self.config.max_num_batched_tokens, self.max_model_len
        sizes = [longest] * (tokens // longest) + [tokens % longest] * (tokens % longest > 0)
        sizes = sizes[: self.config.max_num_seqs]
        self._prefill_padding(sizes)
        # What decode needs at most beyond that: logits, a copy of those that are drawn from, and
        # room for the graphs' own memory.
        logits = torch.zeros(
            self.config.max_num_seqs, self.model_config.vocab_size, device=self.device
        )
        logits.softmax(-1)

    def _prefill_padding(self, sizes: list[int]) -> torch.Tensor:
        """Prefills sequences of these lengths in the padding block; returns their logits."""
        count = len(sizes)
        layout = InputLayout(False, sum(sizes), count, count, self.max_blocks, max(sizes))
        host = np.zeros(layout.size, np.int32)
        views = layout.views(host)
        np.cumsum(sizes, out=views["cu_seqlens_q"][1:])
        views["context_lens"][:] = sizes
        return self._prefill(layout, torch.from_numpy(host).to(self.device))

    def _warm_up(self, dtype: torch.dtype) -> None:
        config, device, vocab_size = self.config, self.device, self.model_config.vocab_size

        def draw(logits: torch.Tensor, params: list[SamplingParams]) -> None:
            zeros = [0] * len(params)
            self._draw(logits, SamplingBatch.of(params, zeros, zeros, zeros, vocab_size, device))

        decode: Callable[[int], object] | None = None
        if config.enforce_eager and isinstance(self.decode, DecodeRunner):
            decode = partial(self.decode.run_padding, device=device)
        warm_up(
            self._prefill_padding,
            self.model.linear_row_counts() + self.backend.prefill_lengths(dtype),
            draw if self.ranks.is_first else None,
            decode,
            config.max_num_seqs,
            min(config.max_num_batched_tokens, self.max_model_len),
        )


def resolve_dtype(wanted: str, checkpoint: str, device: torch.device) -> torch.dtype:
    """The dtype that option `wanted` means; "auto": the checkpoint's on CUDA, else float32."""
    if wanted == "auto":
        wanted = checkpoint if device.type == "cuda" else "float32"
    return getattr(torch, wanted)


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 0 for any other."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count
