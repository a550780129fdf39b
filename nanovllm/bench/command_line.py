"""The command line of `bench_pipeline.py`: its options, and what they are where nothing is said.

One of six tasks is asked for: --workload decode, growing, nano or prefill, --map, or --curves.
Every option but --device and --json belongs to some of them only; given to another, it is refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanovllm.bench import BenchError
from nanovllm.bench.arms import FALLBACK, GREEN, QKV_LANE, Split
from nanovllm.bench.engines import TINY
from nanovllm.bench.nano import REQUESTS
from nanovllm.bench.power import command_for
from nanovllm.bench.shapes import SIZES
from nanovllm.config import PIPELINE_MODES, Config
from nanovllm.engine.llm_engine import resolve_device

MODES = ("sequential", "microbatch", "streams", "green", "auto")
WORKLOADS = ("decode", "growing", "nano", "prefill")

ENGINE = ("layers", "enforce_eager", "sync")
MODEL = ("shape", "model", *ENGINE)
SPLIT = ("attention_sms", "ffn_sms")
PICTURE = ("plot", "stored")
OPTIONS: dict[str, tuple[str, ...]] = {
    "decode": (*MODEL, *SPLIT, "batch", "context", "output", "seconds", "modes", "timeline",
               "power"),
    "growing": (*MODEL, *SPLIT, "batch", "context", "until", "stages", "output", "rounds", "modes",
                "splits"),
    "nano": (*MODEL, *SPLIT, "requests", "mode"),
    "prefill": ("shape", "model", "layers", "requests", "tokens"),
    "map": (*ENGINE, *SPLIT, *PICTURE, "shapes", "batches", "contexts", "splits", "seconds",
            "modes"),
    "curves": PICTURE,
}  # fmt: skip
# What each task does where the command line says nothing; a CPU is to be done in seconds.
DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "decode": {
        "cuda": {"batch": 256, "context": 1024, "output": 64, "seconds": 2.0, "modes": MODES},
        "cpu": {"batch": 8, "context": 64, "output": 16, "seconds": 0.5, "modes": MODES},
    },
    "growing": {
        "cuda": {
            "batch": 512,
            "context": 128,
            "until": 4096,
            "stages": 16,
            "output": 24,
            "rounds": 2,
            "modes": ("sequential", "green", "auto"),
        },
        "cpu": {
            "batch": 4,
            "context": 16,
            "until": 64,
            "stages": 3,
            "output": 8,
            "rounds": 2,
            "modes": ("sequential", "microbatch", "auto"),
        },
    },
    "nano": {
        "cuda": {"requests": REQUESTS, "mode": "sequential"},
        "cpu": {"requests": 2, "mode": "sequential"},
    },
    "prefill": {
        "cuda": {"requests": 8, "tokens": 2048},
        "cpu": {"requests": 2, "tokens": 64},
    },
    "map": {
        "cuda": {
            "shapes": tuple(SIZES),
            "batches": (1, 8, 32, 128, 256, 512, 1024),
            "contexts": (128, 512, 1024, 2048, 8192),
            "seconds": 0.3,
            "modes": ("sequential", "streams", "green", "auto"),
        },
        "cpu": {
            "shapes": (TINY,),
            "batches": (1, 4),
            "contexts": (32, 64),
            "seconds": 0.05,
            "modes": ("sequential", "microbatch", "auto"),
        },
    },
    "curves": {"cuda": {}, "cpu": {}},
}
# The model on a GPU where none is given: a shape, and how many layers of it, None for all.
# Growing to 4096 tokens, 512 sequences have 240 GB of keys and values in 28 layers.
DEFAULT_SHAPE: dict[str, tuple[str, int | None]] = {
    "decode": ("0.6B", None),
    "growing": ("0.6B", 14),
    "nano": ("0.6B", None),
    "prefill": ("8B", None),
}


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line; `complete` fills in what depends on task and device."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group().add_argument
    task("--workload", choices=WORKLOADS, help="default: decode")
    task("--map", action="store_true", help="decode at many shapes, batches and contexts")
    task("--curves", action="store_true", help="attention and GEMM rates against SM count")
    add = parser.add_argument
    add("--device", default="auto", help="'auto', 'cpu', 'cuda' or 'cuda:N'")
    add("--json", type=Path, metavar="FILE", help="write the JSON object there")
    engine = parser.add_argument_group("the engine").add_argument
    engine("--shape", choices=[*SIZES, TINY], help="random weights of this Qwen3 size")
    engine("--model", metavar="DIR", help="a checkpoint instead: directory or hub id")
    engine("--layers", type=positive(int), metavar="L", help="with a shape: so many layers of it")
    engine("--enforce-eager", action="store_true", help="without CUDA graphs")
    engine("--sync", action="store_true", help="start no step before the last one's tokens came")
    engine("--attention-sms", type=positive(int), metavar="A", help="default: what the FFN leaves")
    engine("--ffn-sms", type=positive(int), metavar="F", help="default: about 72%% of the device")
    add_decode_options(parser)
    add_map_options(parser)
    requests = parser.add_argument_group("--workload nano and prefill").add_argument
    requests("--requests", type=positive(int), metavar="N", help=f"nano: {REQUESTS} on a GPU")
    requests("--mode", choices=PIPELINE_MODES, help="nano: run it with the pipeline, in this mode")
    requests("--tokens", type=positive(int), metavar="T", help="prefill: of each prompt")
    return parser


def add_decode_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("--workload decode and growing, and --map").add_argument
    add("--batch", type=positive(int), metavar="N", help="sequences")
    add("--context", type=positive(int), metavar="C", help="tokens of each at the beginning")
    add("--output", type=positive(int), metavar="K", help="steps in a row, then it begins again")
    add("--until", type=positive(int), metavar="C", help="growing: tokens of each at the end")
    add("--stages", type=positive(int), metavar="M", help="growing: contexts where steps are run")
    add("--rounds", type=positive(int), metavar="R", help="growing: how often, for each arm")
    add("--timeline", metavar="FILE", help="draw (.png) or trace a step of the last mode")
    add("--power", action="store_true", help="decode: watts, SM clock and joules, by nvidia-smi")
    add("--seconds", type=positive(float), metavar="S", help="of measured steps for each arm")
    add(
        "--modes",
        nargs="+",
        choices=[*MODES, QKV_LANE, FALLBACK],
        help="default: all but lanes3 and fallback, in a map also microbatch, and growing "
        "sequential, green and auto; sequential is always one",
    )
    add(
        "--splits",
        nargs="+",
        type=split,
        metavar="A+F",
        help="map and growing: SMs of attention and FFN, an arm each; --attention-sms and "
        "--ffn-sms are auto's",
    )


def add_map_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("--map and --curves").add_argument
    add("--plot", type=Path, metavar="FILE.png", help="draw a picture, too")
    add(
        "--from",
        dest="stored",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="measure nothing, but take the results from --json of earlier runs; maps are joined",
    )
    add("--shapes", nargs="+", choices=[*SIZES, TINY], help="default: all but tiny")
    add("--batches", nargs="+", type=positive(int), metavar="N", help="default: 1 to 1024")
    add("--contexts", nargs="+", type=positive(int), metavar="C", help="default: 128 to 8192")


def positive(kind: type) -> Callable[[str], Any]:
    """An argument type: numbers of `kind` above 0."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    convert.__name__ = kind.__name__
    return convert


def split(text: str) -> Split:
    """An argument type: two numbers of SMs."""
    match = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not of the form A+F, such as 36+96")
    return int(match[1]), int(match[2])


def complete(args: argparse.Namespace) -> None:
    """Sets `args.task` and, but for stored results, the task's defaults; `args.device` is resolved.

    Raises:
        BenchError: options do not fit together, or there is no such device.
    """
    args.task = "map" if args.map else "curves" if args.curves else args.workload or "decode"
    check_options(args)
    check_files(args)
    if args.stored is not None:
        return
    try:
        args.device = resolve_device(Config(device=args.device).device)
    except ValueError as error:
        raise BenchError(str(error)) from error
    if args.power:
        command_for(args.device)  # says so at once if it cannot be measured
    for name, default in DEFAULTS[args.task][args.device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.task == "map":
        complete_map(args)
    elif args.task in DEFAULT_SHAPE and args.shape is None and args.model is None:
        complete_shape(args)
    if args.splits is not None and GREEN not in args.modes:
        raise BenchError("--splits needs green among --modes")
    if args.layers is not None and {args.shape, *(args.shapes or ())}.isdisjoint(SIZES):
        raise BenchError("--layers needs --shape: a checkpoint has the layers that it has")


def complete_shape(args: argparse.Namespace) -> None:
    """The model of a task that was given none."""
    if args.device.type == "cpu":
        args.shape = TINY
        return
    args.shape, layers = DEFAULT_SHAPE[args.task]
    args.layers = args.layers or layers


def check_options(args: argparse.Namespace) -> None:
    """Refuses options of other tasks, and those that say the same twice."""
    for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
        if getattr(args, name) in (None, False):
            continue
        if name not in OPTIONS[args.task]:
            tasks = [task_flag(task) for task, names in OPTIONS.items() if name in names]
            raise BenchError(f"{flag(name)} is an option of {' and '.join(tasks)} only")
        if args.stored is not None and name not in PICTURE:
            raise BenchError(f"{flag(name)} has no meaning with --from: nothing is measured")
    if args.shape is not None and args.model is not None:
        raise BenchError("give either --shape or --model")


def flag(name: str) -> str:
    """The option behind a field of the arguments."""
    return "--from" if name == "stored" else f"--{name.replace('_', '-')}"


def task_flag(task: str) -> str:
    return f"--workload {task}" if task in WORKLOADS else f"--{task}"


def check_files(args: argparse.Namespace) -> None:
    """Refuses at once what would fail only after everything is measured."""
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path is not None and not path.parent.is_dir():
            raise BenchError(f"--{name} {path}: there is no directory {path.parent}")
    if args.plot is not None:
        if args.plot.suffix != ".png":
            raise BenchError(f"--plot {args.plot} is not allowed: the name must end in .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise BenchError("--plot needs matplotlib: pip install matplotlib")
    if args.task == "curves" and args.stored is not None and len(args.stored) > 1:
        raise BenchError("--curves --from takes one file")


def complete_map(args: argparse.Namespace) -> None:
    """Puts the points in order, and refuses layers that nothing would use."""
    args.shapes = ordered_by(args.shapes, [TINY, *SIZES])
    args.batches, args.contexts = sorted({*args.batches}), sorted({*args.contexts})
    if args.layers is not None and TINY in args.shapes:
        raise BenchError(f"--layers does not go with {TINY} among --shapes: its layers are fixed")


def ordered_by(names: Sequence[str], order: Sequence[str]) -> list[str]:
    return [name for name in order if name in names]
