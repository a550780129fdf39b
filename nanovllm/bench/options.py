"""The command line of `bench_pipeline.py`.

Every option belongs to some workloads only; given to another, it is refused. The tables say which,
and what each workload does where the command line says nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanovllm.bench import BenchError
from nanovllm.bench.arms import FALLBACK, GREEN, LANES3, SEQUENTIAL, Split
from nanovllm.bench.power import check_power
from nanovllm.bench.requests import REQUEST_SETS
from nanovllm.bench.shapes import SIZES
from nanovllm.config import PIPELINE_MODES, Config
from nanovllm.utils.command_line import Parser, check_output
from nanovllm.utils.device import resolve_device

MODES = (SEQUENTIAL, "microbatch", "streams", GREEN, "auto")
# The embedded model's name among the shapes; its weights are no random ones.
TINY = "tiny"


class Or(NamedTuple):
    """A default that depends on the device; a CPU is to be done in seconds."""

    cuda: Any
    cpu: Any


ENGINE = {"layers": None, "tensor_parallel_size": 1, "enforce_eager": False, "sync": False}
MODEL = {"shape": Or("0.6B", TINY), "model": None, **ENGINE}
SPLIT = {"attention_sms": None, "ffn_sms": None}
PICTURE = {"plot": None, "stored": None}
CHOSEN = ("sequential", "microbatch", "auto")

WORKLOADS: dict[str, dict[str, Any]] = {
    "decode": {
        **MODEL, **SPLIT, "batch": Or(256, 8), "context": Or(1024, 64), "output": Or(64, 16),
        "seconds": Or(2.0, 0.5), "modes": MODES, "timeline": None, "power": False,
    },
    "growing": {
        **MODEL, **SPLIT, "batch": Or(512, 4), "context": Or(128, 16), "until": Or(4096, 64),
        "stages": Or(16, 3), "output": Or(24, 8), "rounds": 2, "splits": None,
        "modes": Or((SEQUENTIAL, GREEN, "auto"), CHOSEN),
    },
    "nano": {**MODEL, **SPLIT, "mode": SEQUENTIAL, "requests": Or(None, 2)},
    "throughput": {
        **MODEL, **SPLIT, "mode": SEQUENTIAL, "requests": "W", "num_requests": Or(None, 2),
        "max_num_seqs": None,
    },
    "prefill": {
        "shape": Or("8B", TINY), "model": None, "layers": None, "tensor_parallel_size": 1,
        "requests": Or(8, 2), "tokens": Or(2048, 64),
    },
    "map": {
        **ENGINE, **SPLIT, **PICTURE, "splits": None,
        "shapes": Or(("0.6B", "1.7B", "4B", "8B", "14B"), (TINY,)),
        "batches": Or((1, 8, 32, 128, 256, 512, 1024), (1, 4)),
        "contexts": Or((128, 512, 1024, 2048, 8192), (32, 64)),
        "seconds": Or(0.3, 0.05), "modes": Or((SEQUENTIAL, "streams", GREEN, "auto"), CHOSEN),
    },
    "curves": PICTURE,
}  # fmt: skip
EVERYWHERE = {"workload", "device", "json"}
# Growing to 4096 tokens, 512 sequences have 240 GB of keys and values in the 28 layers of 0.6B.
GROWING_LAYERS = 14


def parse(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, completed: what a workload does not have is None. `device` is resolved.

    Says what is wrong and exits with code 2, if so.
    """
    parser = make_parser(description)
    args = parser.parse_args(argv)
    try:
        complete(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The bare command line; only options that are given are in what it parses."""
    parser = Parser(description, argument_default=argparse.SUPPRESS)

    def group(title: str) -> Callable[..., None]:
        added = parser.add_argument_group(title)

        def add(option: str, what: str, **how: Any) -> None:
            name = how.get("dest") or option[2:].replace("-", "_")
            owners = [workload for workload, names in WORKLOADS.items() if name in names]
            of_all = len(owners) in (0, len(WORKLOADS))
            added.add_argument(
                option, help=what if of_all else f"{what} ({', '.join(owners)})", **how
            )

        return add

    task = parser.add_mutually_exclusive_group().add_argument
    task("--workload", choices=WORKLOADS, help="what to measure; default: decode")
    for name in ("map", "curves"):
        task(
            f"--{name}", dest="workload", action="store_const", const=name,
            help=f"short for --workload {name}",
        )  # fmt: skip
    add = group("where")
    add("--device", "'auto', 'cpu', 'cuda' or 'cuda:N'")
    add("--json", "write the JSON object there", type=Path, metavar="FILE")
    add = group("the engine")
    add("--shape", "random weights of this Qwen3 size, or the embedded tiny model",
        choices=[*SIZES, TINY])  # fmt: skip
    add("--model", "a checkpoint instead: directory or hub id", metavar="DIR")
    add("--layers", "so many layers of a shape", type=positive(int), metavar="L")
    add("--tensor-parallel-size", "ranks, a GPU each", type=positive(int), metavar="N")
    add("--enforce-eager", "without CUDA graphs", action="store_true")
    add("--sync", "start no step before the last one's tokens came", action="store_true")
    add("--attention-sms", "default: what the FFN leaves", type=positive(int), metavar="A")
    add("--ffn-sms", "default: about 72%% of the device", type=positive(int), metavar="F")
    add = group("the modes that are compared")
    add("--modes", "sequential is always one", nargs="+", choices=[*MODES, LANES3, FALLBACK])
    add("--mode", "of the one run", choices=PIPELINE_MODES)
    add("--splits", "SMs of attention and FFN, an arm each; --attention-sms and --ffn-sms are then "
        "auto's", nargs="+", type=split, metavar="A+F")  # fmt: skip
    add("--seconds", "of measured steps for each mode", type=positive(float), metavar="S")
    add("--rounds", "how often, for each mode", type=positive(int), metavar="R")
    add("--timeline", "draw (.png) or trace (.json) a step of the last mode", type=Path,
        metavar="FILE")  # fmt: skip
    add("--power", "watts, SM clock and joules a step", action="store_true")
    add = group("decode steps")
    add("--batch", "sequences", type=positive(int), metavar="N")
    add("--context", "tokens of each at the beginning", type=positive(int), metavar="C")
    add("--output", "steps in a row, then it begins again", type=positive(int), metavar="K")
    add("--until", "tokens of each at the end", type=positive(int), metavar="C")
    add("--stages", "contexts where steps are run", type=positive(int), metavar="M")
    add("--shapes", "one map each", nargs="+", choices=[*SIZES, TINY])
    add("--batches", "sequences", nargs="+", type=positive(int), metavar="N")
    add("--contexts", "tokens of each", nargs="+", type=positive(int), metavar="C")
    add = group("requests")
    sets = ", ".join(REQUEST_SETS)
    add("--requests", f"how many; throughput: which set, {sets}", metavar="N or NAME")
    add("--num-requests", "only the first of the set", type=positive(int), metavar="N")
    add("--max-num-seqs", "that run at a time; default: 1024, steady: 256", type=positive(int),
        metavar="N")  # fmt: skip
    add("--tokens", "of each prompt", type=positive(int), metavar="T")
    add = group("pictures")
    add("--plot", "draw a picture, too", type=Path, metavar="FILE.png")
    add("--from", "measure nothing, but take the results from --json of earlier runs; maps are "
        "joined", dest="stored", nargs="+", type=Path, metavar="FILE")  # fmt: skip
    return parser


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
    """Checks the options that are given, resolves the device and fills in all others."""
    given = set(vars(args))
    args.workload = vars(args).get("workload", "decode")
    own = WORKLOADS[args.workload]
    check_names(args, given)
    args.device = resolve_device(Config(device=vars(args).get("device", "auto")).device)
    for name in {"json", *(name for names in WORKLOADS.values() for name in names)} - given:
        default = own.get(name)
        if isinstance(default, Or):
            default = getattr(default, args.device.type)
        setattr(args, name, default)
    check_files(args)
    if args.stored is None:
        complete_engine(args, given)
        complete_requests(args)


def check_names(args: argparse.Namespace, given: set[str]) -> None:
    """Refuses options of other workloads, and those that say the same twice."""
    own = WORKLOADS[args.workload]
    for name in sorted(given - EVERYWHERE):
        if name not in own:
            owners = [workload for workload, names in WORKLOADS.items() if name in names]
            raise BenchError(
                f"{flag(name)} is an option of --workload {', '.join(owners)}, not of "
                f"{args.workload}"
            )
        if "stored" in given and name not in PICTURE:
            raise BenchError(f"{flag(name)} has no meaning with --from: nothing is measured")
    if {"shape", "model"} <= given:
        raise BenchError("give either --shape or --model")


def check_files(args: argparse.Namespace) -> None:
    """Refuses at once what would fail only after everything is measured."""
    for name, endings in {"json": (), "plot": (".png",), "timeline": (".png", ".json")}.items():
        if (path := getattr(args, name)) is not None:
            try:
                check_output(path, *endings)
            except ValueError as error:
                raise BenchError(f"{flag(name)} {error}") from None
    if args.workload == "curves" and args.stored is not None and len(args.stored) > 1:
        raise BenchError("--curves --from takes one file")


def complete_engine(args: argparse.Namespace, given: set[str]) -> None:
    """Model and modes; puts the points of a map in order."""
    if args.model is not None:
        args.shape = None
    if args.layers is not None and {args.shape, *(args.shapes or ())}.isdisjoint(SIZES):
        raise BenchError("--layers needs --shape: a checkpoint has the layers that it has")
    if args.workload == "growing" and args.device.type == "cuda" and not {
        "shape", "model", "layers"
    } & given:  # fmt: skip
        args.layers = GROWING_LAYERS
    if args.workload == "map":
        args.shapes = [name for name in (TINY, *SIZES) if name in args.shapes]
        args.batches, args.contexts = sorted({*args.batches}), sorted({*args.contexts})
        if args.layers is not None and TINY in args.shapes:
            raise BenchError(f"--layers does not go with {TINY} among --shapes")
    if (args.tensor_parallel_size or 1) > 1 and args.modes and "modes" not in given:
        args.modes = [SEQUENTIAL]
    if args.splits is not None and GREEN not in args.modes:
        raise BenchError("--splits needs green among --modes")
    if args.timeline is not None and args.tensor_parallel_size > 1:
        raise BenchError("--timeline needs --tensor-parallel-size 1")
    if args.power:
        check_power(args.device)


def complete_requests(args: argparse.Namespace) -> None:
    """--requests is a name for throughput, else a number."""
    if args.workload == "throughput":
        if args.requests not in REQUEST_SETS:
            allowed = ", ".join(REQUEST_SETS)
            raise BenchError(f"--requests {args.requests} is not allowed: it must be of {allowed}")
    elif isinstance(args.requests, str):
        try:
            args.requests = positive(int)(args.requests)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise BenchError(f"--requests: {error}") from error


def flag(name: str) -> str:
    """The option behind a field of the arguments."""
    return "--from" if name == "stored" else f"--{name.replace('_', '-')}"
