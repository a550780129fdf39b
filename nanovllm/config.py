"""The options of an engine: their defaults, and which values are allowed.

    Config(model="Qwen/Qwen3-0.6B", enable_pipeline=True)

A field is checked whenever it is set, at construction or later, so a `Config` is valid at any time.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from nanovllm.tiny import CHECKPOINT_DIR
from nanovllm.utils.options import (
    BOOLEAN,
    Rule,
    as_text,
    check_value,
    choice,
    hinting,
    integer,
    number,
    option,
    rule_of,
)

DType = Literal["auto", "float32", "bfloat16", "float16"]
LoadFormat = Literal["auto", "dummy"]
AttentionBackend = Literal["auto", "triton", "flash_attn", "torch"]
AllReduce = Literal["auto", "nccl"]
GenerationConfig = Literal["auto", "none"]
PipelineMode = Literal["auto", "sequential", "microbatch", "streams", "green"]
PIPELINE_MODES = get_args(PipelineMode)


def _path(value: Any) -> str | None:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    return path if isinstance(path, str) else None


MODEL = Rule("a directory or a hub id", bool, _path)
DEVICE = Rule(
    "'auto', 'cpu', 'cuda' or 'cuda:N'",
    lambda name: bool(re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", name or "")),
    as_text,
)


@hinting
@dataclass
class Config:
    """Options of one engine.

    Attributes:
        model: a directory with a checkpoint, or a hub id; default: the embedded tiny model.
        max_num_batched_tokens: tokens of one prefill step; longer prompts are prefilled in chunks.
        max_num_seqs: sequences that may run at a time, hence the largest decode batch.
        max_model_len: longest sequence in tokens, prompt and output; the model's own limit caps it.
            A prompt as long as that still gets one token.
        gpu_memory_utilization: share of the device's memory the engine may fill (CUDA only).
        tensor_parallel_size: ranks over which weights and KV heads are split.
        enforce_eager: decode without CUDA graphs.
        kvcache_block_size: tokens in a KV block.
        num_kvcache_blocks: KV blocks to allocate; -1: as many as memory allows (on the CPU, at
            most 1 GiB, and a block takes memory only once it has been used).
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
        all_reduce: "auto" lets GPUs of one host read and write each other's memory where they can;
            "nccl" does not.
        step_timeout: seconds without progress after which a step of several ranks is an error.
        generation_config: "auto" takes temperature, top_k, top_p, min_p, repetition_penalty and
            max_new_tokens of the model's generation_config.json where a call does not say;
            "none" does not.
    """

    model: str = option(str(CHECKPOINT_DIR), MODEL)
    max_num_batched_tokens: int = option(16384, integer(1))
    max_num_seqs: int = option(512, integer(1, 2**20))
    max_model_len: int = option(4096, integer(2))
    gpu_memory_utilization: float = option(0.9, number(0, 1, open_low=True))
    tensor_parallel_size: int = option(1, integer(1))
    enforce_eager: bool = option(False, BOOLEAN)
    kvcache_block_size: int = option(256, integer(16, 2**20, multiple_of=16))
    num_kvcache_blocks: int = option(-1, integer(1, 2**31 - 1) | choice(-1))
    device: str = option("auto", DEVICE)
    dtype: DType = option("auto", choice(*get_args(DType)))
    load_format: LoadFormat = option("auto", choice(*get_args(LoadFormat)))
    attention_backend: AttentionBackend = option("auto", choice(*get_args(AttentionBackend)))
    enable_prefix_caching: bool = option(True, BOOLEAN)
    async_scheduling: bool = option(True, BOOLEAN)
    enable_pipeline: bool = option(False, BOOLEAN)
    pipeline_attention_sm_count: int = option(16, integer(1))
    pipeline_ffn_sm_count: int = option(16, integer(1))
    pipeline_enable_profiling: bool = option(False, BOOLEAN)
    pipeline_mode: PipelineMode = option("auto", choice(*PIPELINE_MODES))
    pipeline_strict: bool = option(False, BOOLEAN)
    all_reduce: AllReduce = option("auto", choice(*get_args(AllReduce)))
    step_timeout: float = option(60.0, number(0, 86400, open_low=True))
    generation_config: GenerationConfig = option("auto", choice(*get_args(GenerationConfig)))

    if not TYPE_CHECKING:  # a type checker that saw it would let any name be set

        def __setattr__(self, name: str, value: Any) -> None:
            object.__setattr__(self, name, check_value(name, value, rule_of(type(self), name)))


class ConfigOptions(TypedDict, total=False):
    """The fields of `Config` but `model`, as the types of keyword arguments."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float
    tensor_parallel_size: int
    enforce_eager: bool
    kvcache_block_size: int
    num_kvcache_blocks: int
    device: str
    dtype: DType
    load_format: LoadFormat
    attention_backend: AttentionBackend
    enable_prefix_caching: bool
    async_scheduling: bool
    enable_pipeline: bool
    pipeline_attention_sm_count: int
    pipeline_ffn_sm_count: int
    pipeline_enable_profiling: bool
    pipeline_mode: PipelineMode
    pipeline_strict: bool
    all_reduce: AllReduce
    step_timeout: float
    generation_config: GenerationConfig
