"""Starts the engine that is measured, with room for the workload."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanovllm.bench import BenchError, DoesNotFit
from nanovllm.bench.shapes import SIZES, shape_directory
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import ADMISSION_RESERVE
from nanovllm.models.qwen3_config import Qwen3Config as ModelConfig
from nanovllm.sampling_params import SamplingParams
from nanovllm.tiny import CHECKPOINT_DIR
from nanovllm.utils.hub import resolve_model

__all__ = ["ModelConfig", "StartedEngine", "fill_cache", "kv_blocks", "room", "start_engine"]


@dataclass(frozen=True)
class StartedEngine:
    """An engine, what its model is called, and the seconds from nothing to ready."""

    engine: LLMEngine
    name: str
    startup_seconds: float


@contextmanager
def start_engine(
    args: argparse.Namespace, *, longest: int = 0, shape: str | None = None, **options: Any
) -> Iterator[StartedEngine]:
    """An engine as the command line says; closed afterwards.

    Args:
        args: model, shape, layers, device, and what else the engine is told.
        longest: tokens that a sequence will have; refused before anything is loaded.
        shape: instead of that in `args`.
        options: further fields of `Config`.

    Raises:
        DoesNotFit: there is not enough memory, or the model does not take so long sequences.
        BenchError: there is no such model, or an option's value is not allowed.
    """
    shape = shape or args.shape
    with ExitStack() as stack:
        directory, name = args.model or str(CHECKPOINT_DIR), shape or Path(args.model).name
        if shape in SIZES:
            directory = stack.enter_context(shape_directory(shape, args.layers))
            options["load_format"], name = "dummy", f"Qwen3-{shape}"
        options |= {
            "device": str(args.device),
            "enforce_eager": bool(args.enforce_eager) or options.get("enforce_eager", False),
            "async_scheduling": not args.sync,
            "tensor_parallel_size": args.tensor_parallel_size,
        }
        start = time.perf_counter()
        try:
            check_length(directory, longest)
            engine = LLMEngine(directory, **options)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise DoesNotFit(str(error)) from error
        except (ValueError, FileNotFoundError) as error:
            raise BenchError(str(error)) from error
        seconds = time.perf_counter() - start
        with engine:
            yield StartedEngine(engine, name, seconds)


def check_length(model: str, longest: int) -> None:
    limit = ModelConfig.from_directory(resolve_model(model)).usable_length
    if longest > limit:
        raise DoesNotFit(
            f"a sequence of {longest} tokens is not allowed: the model's longest has {limit}"
        )


def kv_blocks(sequences: int, tokens: int, block_size: int) -> int:
    """KV blocks for so many sequences of `tokens` tokens that are all admitted at a time."""
    blocks = sequences * -(-tokens // block_size)
    return int(blocks * (1 + 2 * ADMISSION_RESERVE)) + 2


def room(args: argparse.Namespace, sequences: int, tokens: int) -> dict[str, Any]:
    """Fields of `Config` that make room for so many sequences of `tokens` tokens, none shared."""
    options: dict[str, Any] = {
        "max_num_seqs": sequences,
        "max_model_len": tokens,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.94,  # there are no requests but ours
    }
    if args.device.type == "cpu" or args.tensor_parallel_size > 1:
        options["num_kvcache_blocks"] = kv_blocks(sequences, tokens, Config.kvcache_block_size)
    return options


@torch.inference_mode()
def fill_cache(engine: LLMEngine) -> None:
    """Random numbers for the whole KV cache: zeros would make some work easier than it is.

    Other ranks' caches can only be reached by prompts, so one is read for each block.
    """
    runner = engine.model_runner
    if engine.config.tensor_parallel_size == 1:
        generator = torch.Generator(runner.device).manual_seed(0)
        runner.model.kv_cache.normal_(generator=generator)
        return
    length = min(runner.max_model_len - 1, runner.block_size)
    ids = torch.randint(runner.model_config.vocab_size, (runner.num_blocks, length))
    once = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=1)
    engine.generate(ids.tolist(), once, use_tqdm=False)
