"""Measures decode in every pipeline mode, in turn in one run, on random weights of any Qwen3 shape.

python bench_pipeline.py                        Qwen3-0.6B's shape; without a GPU the tiny model
python bench_pipeline.py --shape 8B --batch 512 --context 512 --attention-sms 36 --ffn-sms 96
python bench_pipeline.py --model Qwen/Qwen3-4B --modes green auto --json result.json
python bench_pipeline.py --workload nano        nano-vllm's own benchmark, prefill included

Prints a table and, as the last line, one JSON object. A step's time is wall time, from the end of
one step to the end of the next: scheduling, model, and tokens on the host. Ratios are speed: above
1 is faster than sequential. On a GPU, "of floor" says how near a step comes to the time in which
weights and KV cache can be read. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nanovllm.bench import BenchError, report
from nanovllm.bench.arms import FALLBACK, choose_split, open_arms
from nanovllm.bench.compare import compare, profile_steps
from nanovllm.bench.floor import Floor, measure_copy_bandwidth
from nanovllm.bench.nano import MAX_MODEL_LEN, REQUESTS, run_nano
from nanovllm.bench.shapes import SIZES, shape_directory
from nanovllm.bench.workload import DecodeWorkload, fill_cache
from nanovllm.config import PIPELINE_MODES, Config
from nanovllm.engine.llm_engine import LLMEngine, resolve_device
from nanovllm.engine.model_runner import sm_count
from nanovllm.tiny import CHECKPOINT_DIR
from nanovllm.utils.timeline import save_timeline

MODES = ("sequential", "microbatch", "streams", "green", "auto")
# What each workload does where the command line says nothing; a CPU is to be done in seconds.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "decode": {
        "cuda": {"batch": 256, "context": 1024, "output": 64, "seconds": 2.0, "modes": MODES},
        "cpu": {"batch": 8, "context": 64, "output": 16, "seconds": 0.5, "modes": MODES},
    },
    "nano": {
        "cuda": {"requests": REQUESTS, "mode": "sequential"},
        "cpu": {"requests": 2, "mode": "sequential"},
    },
}
DEFAULT_SHAPE = "0.6B"


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        device = complete(args)
        with model_directory(args) as (directory, name):
            run = run_nano_workload if args.workload == "nano" else run_decode_workload
            record = run(args, directory, name, device)
    except BenchError as error:
        parser.error(str(error))
    line = json.dumps(record)
    if args.json is not None:
        args.json.write_text(line + "\n", encoding="utf-8")
    print(line)


def make_parser() -> argparse.ArgumentParser:
    """The command line; `complete` fills in what depends on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workload", choices=("decode", "nano"), default="decode")
    add("--shape", choices=SIZES, help="random weights of this Qwen3 size")
    add("--model", metavar="DIR", help="a checkpoint instead: directory or hub id")
    add("--layers", type=positive(int), metavar="L", help="with a shape: so many layers of it")
    add("--device", default="auto", help="'auto', 'cpu', 'cuda' or 'cuda:N'")
    add("--enforce-eager", action="store_true", help="without CUDA graphs")
    add("--sync", action="store_true", help="start no step before the last one's tokens are here")
    add("--attention-sms", type=positive(int), metavar="A", help="default: what the FFN leaves")
    add("--ffn-sms", type=positive(int), metavar="F", help="default: about 72%% of the device")
    add("--json", type=Path, metavar="FILE", help="write the JSON object there as well")
    decode = parser.add_argument_group("decode steps").add_argument
    decode("--batch", type=positive(int), metavar="N", help="sequences")
    decode("--context", type=positive(int), metavar="C", help="tokens of each at the beginning")
    decode("--output", type=positive(int), metavar="K", help="steps until it begins again")
    decode("--seconds", type=positive(float), metavar="S", help="of measured steps for each mode")
    decode(
        "--modes",
        nargs="+",
        choices=[*MODES, FALLBACK],
        help="default: all but fallback; sequential is always one",
    )
    decode("--timeline", metavar="FILE", help="draw (.png) or trace a step of the last mode")
    nano = parser.add_argument_group("--workload nano").add_argument
    nano("--requests", type=positive(int), metavar="N", help=f"default: {REQUESTS} on a GPU")
    nano("--mode", choices=PIPELINE_MODES, help="run it with the pipeline, in this mode")
    return parser


def positive(kind: type) -> Any:
    """An argument type: numbers of `kind` above 0."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    convert.__name__ = kind.__name__
    return convert


def complete(args: argparse.Namespace) -> torch.device:
    """Fills in the defaults of the device, which it returns; refuses what does not fit together."""
    try:
        device = resolve_device(Config(device=args.device).device)
    except ValueError as error:
        raise BenchError(str(error)) from error
    for workload, defaults in DEFAULTS.items():
        for name, default in defaults[device.type].items():
            if workload == args.workload:
                setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
            elif getattr(args, name) is not None:
                raise BenchError(f"--{name} is an option of --workload {workload} only")
    if args.workload != "decode" and args.timeline is not None:
        raise BenchError("--timeline is an option of --workload decode only")
    if args.shape is not None and args.model is not None:
        raise BenchError("give either --shape or --model")
    if args.shape is None and args.model is None and device.type == "cuda":
        args.shape = DEFAULT_SHAPE
    if args.layers is not None and args.shape is None:
        raise BenchError("--layers needs --shape: a checkpoint has the layers that it has")
    if args.json is not None and not args.json.parent.is_dir():
        raise BenchError(f"--json {args.json}: there is no directory {args.json.parent}")
    return device


@contextmanager
def model_directory(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Where the model is, and what it is called."""
    if args.shape is not None:
        with shape_directory(args.shape, args.layers) as directory:
            yield directory, args.shape
    elif args.model is not None:
        yield args.model, Path(args.model).name
    else:
        yield str(CHECKPOINT_DIR), "tiny"


def run_decode_workload(
    args: argparse.Namespace, directory: str, name: str, device: torch.device
) -> dict[str, Any]:
    """Compares the modes; prints the table and returns the JSON object."""
    workload = DecodeWorkload(args.batch, args.context, args.output)
    options: dict[str, Any] = {"max_num_seqs": args.batch, "enable_prefix_caching": False}
    options["max_model_len"] = max(Config.max_model_len, workload.max_len)
    if device.type == "cpu":
        options["num_kvcache_blocks"] = workload.blocks(Config.kvcache_block_size)
    with open_engine(args, directory, **options) as engine:
        workload.check_fits(engine)
        fill_cache(engine)
        floor = None
        if device.type == "cuda":
            bandwidth = measure_copy_bandwidth(device)
            floor = Floor.of(engine.model_runner.model, workload, bandwidth)
        modes = dict.fromkeys(("sequential", *args.modes))
        with open_arms(engine, list(modes), split_of(args, device)) as arms:
            times = compare(engine, arms, workload, args.seconds)
            record = report.describe_run(engine, "decode steps", name)
            record |= report.decode_record(workload, floor, arms, times)
            if args.timeline is not None:
                save_timeline(profile_steps(engine, arms[-1], workload), args.timeline)
    print(report.format_decode(record))
    return record


def run_nano_workload(
    args: argparse.Namespace, directory: str, name: str, device: torch.device
) -> dict[str, Any]:
    """Runs nano-vllm's benchmark; prints the result and returns the JSON object."""
    options: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN}
    if args.mode != "sequential":
        options |= {"enable_pipeline": True, "pipeline_mode": args.mode}
        sms = split_of(args, device)
        if sms is not None:
            options |= {"pipeline_attention_sm_count": sms[0], "pipeline_ffn_sm_count": sms[1]}
    with open_engine(args, directory, **options) as engine:
        result = run_nano(engine, args.requests)
        record = report.describe_run(engine, "nano", name)
        record |= report.nano_record(engine.model_runner, result)
    print(report.format_nano(record))
    return record


def split_of(args: argparse.Namespace, device: torch.device) -> tuple[int, int] | None:
    """SMs of attention and FFN to ask for; None where there are no SMs."""
    return choose_split(sm_count(device), args.attention_sms, args.ffn_sms)


def open_engine(args: argparse.Namespace, directory: str, **options: Any) -> LLMEngine:
    """The engine to measure.

    Raises:
        BenchError: there is no such model, or it does not fit.
    """
    options["load_format"] = "auto" if args.shape is None else "dummy"
    options |= {"device": args.device, "enforce_eager": args.enforce_eager}
    try:
        return LLMEngine(directory, async_scheduling=not args.sync, **options)
    except (ValueError, FileNotFoundError, MemoryError) as error:
        raise BenchError(str(error)) from error


if __name__ == "__main__":
    main()
