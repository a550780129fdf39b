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
    args: argparse.Namespace, *, longest: int = 0, **options: Any
) -> Iterator[tuple[LLMEngine, Record]]:
    """An engine as the command line says, and the record of it; closed afterwards.

    `options` are further fields of `Config`.

    Raises:
        DoesNotFit: there is not enough memory, or the model takes no `longest` tokens a sequence,
            which is found out before anything is loaded.
        BenchError: there is no such model, or an option's value is not allowed.
    """
    with ExitStack() as stack:
        directory, name = str(CHECKPOINT_DIR), args.shape
        if args.model is not None:
            directory, name = args.model, Path(args.model).name
        if args.shape in SIZES:
            directory = stack.enter_context(shape_directory(args.shape, args.layers))
            options["load_format"], name = "dummy", f"Qwen3-{args.shape}"
        options = {
            "device": str(args.device),
            "async_scheduling": not args.sync,
            "tensor_parallel_size": args.tensor_parallel_size,
        } | options
        start = time.perf_counter()
        try:
            limit = load_config(resolve_model(directory)).usable_length
            if longest > limit:
                raise DoesNotFit(f"{longest} tokens are too many: the model's longest has {limit}")
            engine = stack.enter_context(LLMEngine(directory, **options))
        except BenchError:
            raise
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise DoesNotFit(str(error)) from error
        except (ValueError, FileNotFoundError) as error:
            raise BenchError(str(error)) from error
        seconds = time.perf_counter() - start
        config, weights = engine.model_runner.model_config, engine.model_runner.model.parameters()
        model = {
            "name": name,
            "layers": config.num_hidden_layers,
            "parameters": config.num_weights,
            "dtype": str(next(weights).dtype).removeprefix("torch."),
        }
        about = {
            "model": model,
            "ranks": args.tensor_parallel_size,
            "options": dataclasses.asdict(engine.config) | {"model": name},
            "startup_seconds": seconds,
        }
        yield engine, about


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
    shape = runner.num_blocks, length
    ids = torch.randint(runner.model_config.vocab_size, shape, device="cpu")
    once = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=1)
    engine.generate(ids.tolist(), once, use_tqdm=False)
