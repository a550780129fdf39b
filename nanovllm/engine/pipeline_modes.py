"""Sets up the plans that a configuration asks for, or says why they cannot be.

    mode         micro-batches  lanes                               needs
    sequential   1              all on the current stream           nothing
    microbatch   2              all on the current stream           nothing
    streams      2              a stream each                       CUDA
    green        2              a stream each, on SMs of its own    CUDA, green contexts
    auto         green on several splits of the SMs and sequential, chosen anew for every step

If what is asked for cannot be had, the engine runs sequential decode, at no cost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from nanovllm.config import Config
from nanovllm.engine.green_manager import Partitions
from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.pipeline_statistics import PipelineStatistics, format_sms
from nanovllm.engine.plan import ATTENTION, GREEN, MICROBATCH, SEQUENTIAL, STREAMS, Plan
from nanovllm.models.stage import Model

logger = logging.getLogger(__name__)

# On fewer SMs some cuBLAS kernels fail: there is no room for their clusters of thread blocks.
MIN_FFN_SMS = 16
MODES = {plan.mode: plan for plan in (SEQUENTIAL, MICROBATCH, STREAMS, GREEN)} | {"auto": GREEN}


class PipelineUnavailable(RuntimeError):
    """This machine or configuration cannot run the pipeline that was asked for."""


@dataclass
class Pipelines:
    """Plans that are ready to run."""

    schedulers: list[PipelineScheduler]  # the first is sequential, and alone after a fallback
    statistics: PipelineStatistics  # says what there is, or why not
    partitions: ExitStack  # to be closed in the end, once no graph uses them


def wanted_plan(config: Config) -> Plan:
    """The plan that a configuration names; of mode "auto" the one on the configured SMs."""
    plan = MODES[config.pipeline_mode] if config.enable_pipeline else SEQUENTIAL
    if plan is not GREEN:
        return plan
    return plan.with_sms([config.pipeline_attention_sm_count, config.pipeline_ffn_sm_count])


def build_pipelines(
    config: Config,
    model: Model,  # its KV cache bound
    device: torch.device,
    device_sms: int,
    plan: Plan | None = None,  # default: what `config` names
    more: Sequence[Plan] = (),  # to choose from beside it; what cannot be made is left out
) -> Pipelines:
    """Builds sequential decode and what `config` asks for; logs why and falls back if it must.

    Raises:
        RuntimeError, ValueError: instead of falling back, with `pipeline_strict`.
    """
    built = Pipelines([], PipelineStatistics(), ExitStack())

    def add(plan: Plan) -> None:
        with ExitStack() as undo:
            granted, streams = _make_lanes(config, plan, device, undo)
            if granted in [scheduler.plan for scheduler in built.schedulers]:
                return  # another request was rounded to the same
            sms = granted.lane_of(ATTENTION).sms or device_sms
            workspace = model.backend.make_workspace(device, sms)
            built.schedulers.append(
                PipelineScheduler(model, granted, streams, workspace, built.statistics, device_sms)
            )
            built.partitions.push(undo.pop_all())

    try:
        add(SEQUENTIAL)
        errors = []
        for each in (plan or wanted_plan(config), *more):
            try:
                add(each)
            # Of the pipeline's own errors, the driver's and torch's, all are RuntimeErrors.
            except (RuntimeError, ValueError) as error:
                logger.info("[ModelRunner] No plan %s: %s", each.name, error)
                errors.append(error)
        if len(built.schedulers) == 1 and errors:
            if config.pipeline_strict:
                raise errors[0]
            logger.warning("[ModelRunner] Failed to initialize pipeline: %s", errors[0])
            logger.warning("[ModelRunner] Falling back to sequential execution")
            built.statistics.fallback_reason = str(errors[0])
        else:
            _describe(built, device_sms, is_auto=bool(more))
        return built
    except BaseException:
        built.partitions.close()
        raise


def _describe(built: Pipelines, device_sms: int, *, is_auto: bool) -> None:
    """Tells log and statistics what was granted; of several plans, the latter name no split."""
    plan, statistics = built.schedulers[:2][-1].plan, built.statistics
    statistics.mode = "auto" if is_auto else plan.mode
    sms = {lane.name: lane.sms for lane in plan.lanes if lane.sms is not None}
    if sms:
        logger.info("[ModelRunner] Pipeline: %s of %d SMs", format_sms(sms), device_sms)
    if sms and not is_auto:
        statistics.lane_sms, statistics.device_sms = sms, device_sms


def _make_lanes(
    config: Config, plan: Plan, device: torch.device, undo: ExitStack
) -> tuple[Plan, Sequence[torch.cuda.Stream]]:
    """The plan with the SMs that were granted, and the streams of its lanes."""
    if not plan.streams:
        return plan, ()
    mode = config.pipeline_mode if plan.mode in MODES else plan.mode
    if device.type != "cuda":
        raise PipelineUnavailable(f"pipeline_mode={mode!r} needs a CUDA GPU, not {device}")
    if mode == "auto" and config.enforce_eager:
        raise PipelineUnavailable(
            "pipeline_mode='auto' chooses between CUDA graphs, and with enforce_eager=True there "
            "are none; 'green' and 'streams' run without"
        )
    if plan.lanes[0].sms is None:
        return plan, [torch.cuda.Stream(device) for _ in plan.lanes]
    names = [f"pipeline_{lane.name}_sm_count" for lane in plan.lanes]
    wanted = [lane.sms or 1 for lane in plan.lanes]
    # `push` registers at once; `enter_context` would call more before, and an interrupt may come.
    partitions = undo.push(Partitions(device, wanted, names))
    attention = plan.lanes.index(plan.lane_of(ATTENTION))
    for i, sms in enumerate(partitions.sms):
        if i != attention and sms < MIN_FFN_SMS:
            raise PipelineUnavailable(
                f"{names[i]}={wanted[i]}: {sms} SMs were granted, and cuBLAS needs at least "
                f"{MIN_FFN_SMS}"
            )
    return plan.with_sms(partitions.sms), partitions.streams
