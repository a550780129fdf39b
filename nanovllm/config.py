"""The options of an engine: their defaults, and which values are allowed.

    Config(model="Qwen/Qwen3-0.6B", enable_pipeline=True)

A field is checked whenever it is set, at construction or later, so a `Config` is valid at any time.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

from nanovllm.tiny import CHECKPOINT_DIR
from nanovllm.utils.options import boolean, check, choice, hinting, integer, number

PIPELINE_MODES = ("auto", "sequential", "microbatch", "streams", "green")


def _model(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        path = os.fspath(value)
        if isinstance(path, str) and path:
            return path
    raise ValueError("a directory or a hub id")


def _device(value: Any) -> str:
    if isinstance(value, str) and (match := re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", value)):
        return match.group()
    raise ValueError("'auto', 'cpu', 'cuda' or 'cuda:N'")


@hinting
@dataclass
class Config:
    """Options of one engine.

    Attributes:
        model: a directory with a checkpoint, or a hub id; default: the embedded tiny model.
        max_num_batched_tokens: tokens of one prefill step; longer prompts are prefilled in chunks.
        max_num_seqs: sequences that may run at a time, hence the largest decode batch.
        max_model_len: longest sequence in tokens, prompt and output; the model's own limit caps it.
        gpu_memory_utilization: share of the device's memory the engine may fill (CUDA only).
        tensor_parallel_size: ranks over which weights and KV heads are split.
        all_reduce: "auto" lets GPUs of one host that can do so read and write each other's memory;
            "nccl" does not.
        step_timeout: seconds after which a step that makes no progress, as a rank is dead or
            silent, ends in an error.
        enforce_eager: decode without CUDA graphs.
        kvcache_block_size: tokens in a KV block.
        num_kvcache_blocks: KV blocks to allocate; -1: as many as memory allows (on the CPU, at
            most 1 GiB).
        device: where to run; "auto" takes CUDA if there is one.
        dtype: of weights, activations and KV cache; "auto": the checkpoint's on CUDA, float32 on
            the CPU.
        load_format: "auto" reads safetensors; "dummy" draws random weights from config.json alone.
        attention_backend: "auto" is "triton" on CUDA and "torch" on the CPU.
        enable_prefix_caching: reuse the KV blocks of equal prompt beginnings.
        async_scheduling: plan and launch a step before the tokens of the last one have reached the
            host; without effect while profiling.
        enable_pipeline: run decode as an attention/FFN pipeline where that is possible.
        pipeline_attention_sm_count: SMs for the attention stage, rounded up to the alignment.
        pipeline_ffn_sm_count: SMs for the FFN stage, rounded up to the alignment.
        pipeline_enable_profiling: time the two stages of every decode step.
        pipeline_mode: how the two micro-batches are issued; see README.
        pipeline_strict: raise instead of falling back to sequential execution.
    """

    model: str = str(CHECKPOINT_DIR)
    max_num_batched_tokens: int = 16384
    max_num_seqs: int = 512
    max_model_len: int = 4096
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    all_reduce: str = "auto"
    step_timeout: float = 60.0
    enforce_eager: bool = False
    kvcache_block_size: int = 256
    num_kvcache_blocks: int = -1
    device: str = "auto"
    dtype: str = "auto"
    load_format: str = "auto"
    attention_backend: str = "auto"
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    enable_pipeline: bool = False
    pipeline_attention_sm_count: int = 16
    pipeline_ffn_sm_count: int = 16
    pipeline_enable_profiling: bool = False
    pipeline_mode: str = "auto"
    pipeline_strict: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, check(self, RULES, name, value))


RULES = {
    "model": _model,
    "max_num_batched_tokens": integer(1),
    "max_num_seqs": integer(1),
    "max_model_len": integer(2),
    "gpu_memory_utilization": number(0, 1, open_low=True),
    "tensor_parallel_size": integer(1),
    "all_reduce": choice("auto", "nccl"),
    "step_timeout": number(0, 86400, open_low=True),
    "enforce_eager": boolean,
    "kvcache_block_size": integer(16, multiple_of=16),
    "num_kvcache_blocks": integer(1, also=-1),
    "device": _device,
    "dtype": choice("auto", "float32", "bfloat16", "float16"),
    "load_format": choice("auto", "dummy"),
    "attention_backend": choice("auto", "triton", "flash_attn", "torch"),
    "enable_prefix_caching": boolean,
    "async_scheduling": boolean,
    "enable_pipeline": boolean,
    "pipeline_attention_sm_count": integer(1),
    "pipeline_ffn_sm_count": integer(1),
    "pipeline_enable_profiling": boolean,
    "pipeline_mode": choice(*PIPELINE_MODES),
    "pipeline_strict": boolean,
}
