"""Starts the engine that is measured, with room for the workload."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from nanovllm.bench import BenchError, DoesNotFit
from nanovllm.bench.report import Record
from nanovllm.bench.shapes import SIZES, shape_directory
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.scheduler import ADMISSION_RESERVE
from nanovllm.models import load_config
from nanovllm.sampling_params import SamplingParams
from nanovllm.tiny import CHECKPOINT_DIR
from nanovllm.utils.hub import resolve_model


@contextmanager
def start_engine(
    args: argparse.Namespace, *, longest: int = 0, shape: str | None = None, **options: Any
) -> Iterator[tuple[LLMEngine, Record]]:
    """An engine as the command line says, and the record of it; closed afterwards.

    `shape` overrides that in `args`; `options` are further fields of `Config`.

    Raises:
        DoesNotFit: there is not enough memory, or the model takes no `longest` tokens a sequence,
            which is found out before anything is loaded.
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
            limit = load_config(resolve_model(directory)).usable_length
            if longest > limit:
                raise DoesNotFit(f"{longest} tokens are too many: the model's longest has {limit}")
            engine = stack.enter_context(LLMEngine(directory, **options))
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise DoesNotFit(str(error)) from error
        except (ValueError, FileNotFoundError) as error:
            raise error if isinstance(error, BenchError) else BenchError(str(error)) from error
        seconds = time.perf_counter() - start
        yield engine, describe_engine(engine, name) | {"startup_seconds": seconds}


def describe_engine(engine: LLMEngine, name: str) -> Record:
    """The record of the model and of the engine's options that are not the defaults."""
    config, runner = engine.config, engine.model_runner
    weights, ranks = list(runner.model.parameters()), config.tensor_parallel_size
    fields = {field.name: field.default for field in dataclasses.fields(Config)}
    return {
        "model": {
            "name": name,
            "layers": runner.model_config.num_hidden_layers,
            # Of several ranks, each has a part.
            "parameters": runner.model_config.num_weights
            if ranks > 1
            else sum(weight.numel() for weight in weights),
            "dtype": str(weights[0].dtype).removeprefix("torch."),
        },
        "ranks": ranks,
        "options": {
            name: getattr(config, name)
            for name, default in fields.items()
            if name != "model" and getattr(config, name) != default
        },
    }


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
