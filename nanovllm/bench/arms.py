"""The pipeline modes beside each other, on the weights and the KV cache of one engine.

    with open_arms(engine, ["sequential", "green"], split=(36, 96)) as arms:
        arms[1].activate()
        engine.step()

An arm that falls back would only measure sequential decode again; it says why instead. To measure
just that, what falling back costs, there is the arm "fallback": a pipeline on more SMs than there
are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from nanovllm.bench import BenchError
from nanovllm.engine.decode_runner import DecodeRunner
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner

FALLBACK = "fallback"
# Of all SMs, the part that the FFN gets by default: a group of whole multiples of 8.
FFN_SHARE = 0.72
FFN_MULTIPLE = 8


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to run decode steps.

    Attributes:
        mode: as asked for.
        runner: the engine's.
        decode: runs the steps.
    """

    mode: str
    runner: ModelRunner
    decode: DecodeRunner

    def activate(self) -> None:
        """Makes the engine's next decode steps run this way; none may be under way."""
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
        self.runner.decode = self.decode

    def fallback_reason(self, batch: int) -> str | None:
        """Why steps of `batch` sequences do not run as asked for; None if they do."""
        if self.mode in ("sequential", FALLBACK):
            return None
        pipeline = self.decode.pipeline
        if pipeline.statistics.fallback_reason is not None:
            return pipeline.statistics.fallback_reason
        if self.mode != "auto" and not pipeline.pipelines(batch):
            return f"a batch of {batch} cannot be cut in two"
        return None


def choose_split(device_sms: int, attention: int | None, ffn: int | None) -> tuple[int, int] | None:
    """SMs to ask for; where nothing is given, what fills the device. None: leave it as it is.

    Raises:
        BenchError: one stage takes all SMs.
    """
    if not device_sms:
        return None
    if ffn is None:
        share = round(device_sms * FFN_SHARE / FFN_MULTIPLE) * FFN_MULTIPLE
        ffn = share if attention is None else device_sms - attention
    if attention is None:
        attention = device_sms - ffn
    if attention < 1 or ffn < 1:
        raise BenchError(f"one stage leaves none of the device's {device_sms} SMs for the other")
    return attention, ffn


@contextmanager
def open_arms(
    engine: LLMEngine, modes: Sequence[str], split: tuple[int, int] | None
) -> Iterator[list[Arm]]:
    """One arm a mode, and afterwards the engine as it was.

    Args:
        engine: its own way must be sequential; it serves as that arm.
        modes: values of `Config.pipeline_mode`, or "fallback".
        split: SMs of attention and FFN; None: the defaults.
    """
    runner = engine.model_runner
    own = runner.decode
    arms: list[Arm] = []
    try:
        for mode in modes:
            if mode == "sequential":
                arms.append(Arm(mode, runner, own))
                continue
            config = dataclasses.replace(runner.config, enable_pipeline=True)
            if mode == FALLBACK:
                config.pipeline_attention_sm_count = runner.device_sms + 1
            else:
                config.pipeline_mode = mode
            if split is not None and mode != FALLBACK:
                config.pipeline_attention_sm_count, config.pipeline_ffn_sm_count = split
            arms.append(Arm(mode, runner, runner.make_decode(config)))
        yield arms
    finally:
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        runner.decode = own
        for arm in arms:
            if arm.decode is not own:
                arm.decode.close()
