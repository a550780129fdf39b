"""Sets the pipeline up as configured, or says why it cannot be.

    mode         micro-batches  streams                       needs
    sequential   1              the current one               nothing
    microbatch   2              the current one               nothing
    streams      2              two plain ones                CUDA
    green        2              two, on disjoint SMs          CUDA, green contexts

Mode "auto" chooses among several of these at every step: see planned_decode.py.

If what is asked for cannot be had, the engine falls back to its ordinary decode path, at no cost.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch

from green_ctx import GreenContextError
from nanovllm.config import Config
from nanovllm.engine.green_manager import GreenContextManager
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.pipeline_statistics import PipelineStatistics
from nanovllm.engine.stage_executor import InlineExecutor, StageExecutor, StreamExecutor
from nanovllm.layers.attention import AttentionBackend
from nanovllm.models.stage import Model

logger = logging.getLogger(__name__)


# On fewer SMs some cuBLAS kernels fail: there is no room for their clusters of thread blocks.
MIN_FFN_SMS = 16


class PipelineUnavailable(RuntimeError):
    """This machine or configuration cannot run the pipeline that was asked for."""


@dataclass
class Pipeline:
    """A pipeline ready to run, or the reason why there is none.

    Attributes:
        scheduler: issues pipelined steps; None after a fallback and in mode "sequential".
        sequential: issues sequential steps in the same two stages, for profiling.
        statistics: of both.
        workspace: attention's scratch memory on the SMs of its partition.
        manager: owner of the partitions, in mode "green".
    """

    scheduler: PipelineScheduler | None
    sequential: PipelineScheduler
    statistics: PipelineStatistics
    workspace: Any = None
    manager: GreenContextManager | None = None

    def pipelines(self, num_seqs: int) -> bool:
        """Whether a decode step of that many sequences runs as a pipeline."""
        return self.scheduler is not None and num_seqs >= 2

    def close(self) -> None:
        """Destroys the partitions, once no graph uses them; may be called twice."""
        if self.manager is not None:
            self.manager.close()


def sequential_pipeline(model: Model, statistics: PipelineStatistics) -> Pipeline:
    """No pipeline, and no reason needed."""
    scheduler = PipelineScheduler(model, InlineExecutor(), statistics, micro_batches=1)
    return Pipeline(None, scheduler, statistics)


def build_pipeline(
    config: Config,
    model: Model,
    backend: AttentionBackend,
    device: torch.device,
    device_sms: int,
    statistics: PipelineStatistics | None = None,
) -> Pipeline:
    """Builds what `config` asks for; logs why and falls back if it cannot be had.

    Args:
        config: the mode ("auto" means green here), its SMs, and whether to fall back.
        model: its KV cache bound.
        backend: of attention.
        device: where.
        device_sms: SMs of the device.
        statistics: shared with other pipelines; default: new ones.

    Raises:
        PipelineUnavailable, GreenContextError, ValueError: instead, with `pipeline_strict`.
    """
    statistics = statistics or PipelineStatistics()
    none = sequential_pipeline(model, statistics)
    if not config.enable_pipeline or config.pipeline_mode == "sequential":
        return none
    mode = "green" if config.pipeline_mode == "auto" else config.pipeline_mode
    try:
        executor, manager = _make_executor(config, mode, device, device_sms)
    except (PipelineUnavailable, GreenContextError, ValueError) as error:
        if config.pipeline_strict:
            raise
        logger.warning("[ModelRunner] Failed to initialize pipeline: %s", error)
        logger.warning("[ModelRunner] Falling back to sequential execution")
        statistics.fallback_reason = str(error)
        return none
    statistics.mode = mode
    scheduler = PipelineScheduler(model, executor, statistics)
    pipeline = Pipeline(scheduler, none.sequential, statistics, manager=manager)
    attention_sms = device_sms
    if manager is not None:
        attention_sms = manager.attention_sms
        statistics.attention_sms, statistics.ffn_sms = manager.attention_sms, manager.ffn_sms
        statistics.device_sms = device_sms
        logger.info(
            "[ModelRunner] Pipeline: attention on %d SMs, FFN on %d of %d",
            manager.attention_sms,
            manager.ffn_sms,
            device_sms,
        )
    try:
        pipeline.workspace = backend.make_workspace(device, attention_sms)
    except BaseException:
        pipeline.close()
        raise
    return pipeline


def _make_executor(
    config: Config, mode: str, device: torch.device, device_sms: int
) -> tuple[StageExecutor, GreenContextManager | None]:
    if config.tensor_parallel_size > 1:
        raise PipelineUnavailable(
            f"tensor_parallel_size={config.tensor_parallel_size}: the pipeline runs on one GPU"
        )
    if mode == "microbatch":
        return InlineExecutor(), None
    if device.type != "cuda":
        raise PipelineUnavailable(
            f"pipeline_mode={config.pipeline_mode!r} needs a CUDA GPU, not {device}"
        )
    if config.pipeline_mode == "auto" and config.enforce_eager:
        raise PipelineUnavailable(
            "pipeline_mode='auto' chooses between CUDA graphs, and with enforce_eager=True there "
            "are none; 'green' and 'streams' run without"
        )
    if mode == "streams":
        return StreamExecutor(torch.cuda.Stream(device), torch.cuda.Stream(device)), None
    manager = GreenContextManager(
        device, config.pipeline_attention_sm_count, config.pipeline_ffn_sm_count
    )
    try:
        if manager.ffn_sms < MIN_FFN_SMS:
            raise PipelineUnavailable(
                f"pipeline_ffn_sm_count={config.pipeline_ffn_sm_count}: {manager.ffn_sms} SMs were "
                f"granted, and cuBLAS needs at least {MIN_FFN_SMS}"
            )
        streams = manager.get_attention_stream(), manager.get_ffn_stream()
        return StreamExecutor(*streams, manager.ffn_sms, device_sms), manager
    except BaseException:
        manager.close()
        raise
