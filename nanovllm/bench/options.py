"""The command line of `python -m nanovllm.bench`: all options, and which of them a workload has."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.bench.arms import FALLBACK, GREEN, LANES3, MICROBATCH, SEQUENTIAL, Split
from nanovllm.bench.requests import REQUEST_SETS
from nanovllm.bench.shapes import SIZES, TINY
from nanovllm.bench.turns import SHORTEST_OUTPUT
from nanovllm.config import PIPELINE_MODES, Config
from nanovllm.utils.command_line import Parser, number, output
from nanovllm.utils.device import resolve_device

PROGRAM = "python -m nanovllm.bench"


def split(text: str) -> Split:
    """An argument type: two numbers of SMs."""
    match = re.fullmatch(r"([1-9]\d*)\+([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text} is not of the form A+F, such as 36+96")
    return int(match[1]), int(match[2])


MODES = (SEQUENTIAL, MICROBATCH, "streams", GREEN, "auto")
COUNT = {"type": number(int), "metavar": "N"}
COUNTS = {"nargs": "+", **COUNT}
OPTIONS: dict[str, dict[str, Any]] = {
    # The engine.
    "shape": {"choices": [*SIZES, TINY], "help": "random weights of this Qwen3 size, or the "
              "embedded tiny model"},
    "model": {"metavar": "DIR", "help": "a checkpoint instead: directory or hub id"},
    "layers": {**COUNT, "help": "of a shape; default: all, growing 14"},
    "tensor-parallel-size": {**COUNT, "help": "ranks, a GPU each"},
    "sync": {"action": "store_true", "help": "start no step before the last one's tokens came"},
    # The modes.
    "mode": {"choices": PIPELINE_MODES, "help": "of the one run"},
    "modes": {"nargs": "+", "choices": [*MODES, LANES3, FALLBACK],
              "help": "compared with sequential; with several ranks only the first is"},
    "attention-sms": {**COUNT, "help": "of the attention lane; default: what the FFN leaves"},
    "ffn-sms": {**COUNT, "help": "of the FFN lane; default: about 72%% of the device"},
    "splits": {"nargs": "+", "type": split, "metavar": "A+F", "help": "SMs of attention and FFN "
               "in mode green, which is compared with each; default: those that auto tries"},
    "seconds": {"type": number(float, 0.001), "metavar": "S", "help": "of measured steps a mode, "
                "at each place"},
    "timeline": {"type": output(".png", ".json"), "metavar": "FILE",
                 "help": "draw (.png) or trace (.json) a step of the last mode"},
    "power": {"action": "store_true", "help": "watts, SM clock and joules a step"},
    # What is decoded or read.
    "batch": {**COUNT, "help": "sequences"},
    "context": {**COUNT, "help": "tokens of each at the beginning"},
    "output": {"type": number(int, SHORTEST_OUTPUT), "metavar": "N",
               "help": "steps in a row, then it begins again"},
    "until": {**COUNT, "help": "tokens of each at the end"},
    "stages": {**COUNT, "help": "contexts where steps are run"},
    "shapes": {"nargs": "+", "choices": [*SIZES, TINY], "help": "one map each"},
    "batches": {**COUNTS, "help": "sequences"},
    "contexts": {**COUNTS, "help": "tokens of each"},
    "requests": {"choices": REQUEST_SETS, "help": "a set, see bench/requests.py"},
    "num-requests": {**COUNT, "help": "only the first of the set"},
    "max-num-seqs": {**COUNT, "help": "that run at a time; default: 1024, steady 256, nano 512"},
    # Pictures.
    "plot": {"type": output(".png"), "metavar": "FILE.png", "help": "draw a picture, too"},
    "from": {"dest": "stored", "nargs": "+", "type": Path, "metavar": "FILE",
             "help": "measure nothing, but take the shapes from --json of earlier maps"},
}  # fmt: skip


ENGINE = {"layers": None, "tensor-parallel-size": 1, "sync": False}
MODEL = {"shape": "0.6B", "model": None, **ENGINE}
SPLIT = {"attention-sms": None, "ffn-sms": None}
REQUESTS = {
    **MODEL, **SPLIT, "mode": SEQUENTIAL, "requests": "W", "num-requests": None,
    "max-num-seqs": None,
}  # fmt: skip
# The options of each workload, with their defaults.
WORKLOADS: dict[str, dict[str, Any]] = {
    "decode": {
        **MODEL, **SPLIT, "batch": 256, "context": 1024, "output": 64, "seconds": 2.0,
        "modes": MODES, "timeline": None, "power": False,
    },
    "growing": {
        **MODEL, **SPLIT, "batch": 512, "context": 128, "until": 4096, "stages": 16, "output": 24,
        "splits": None, "modes": (SEQUENTIAL, GREEN, "auto"),
    },
    "nano": {**REQUESTS, "max-num-seqs": Config.max_num_seqs},
    "throughput": REQUESTS,
    "prefill": {**REQUESTS, "shape": "8B", "requests": "prefill"},
    "map": {
        **ENGINE, **SPLIT, "splits": None, "plot": None, "from": None,
        "shapes": ("0.6B", "1.7B", "4B", "8B", "14B"),
        "batches": (1, 8, 32, 128, 256, 512, 1024), "contexts": (128, 512, 1024, 2048, 8192),
        "seconds": 0.3, "modes": (SEQUENTIAL, "streams", GREEN, "auto"),
    },
    "curves": {"plot": None},
}  # fmt: skip
# Other defaults without a GPU, to be done in seconds.
ON_CPU = {
    "shape": TINY, "shapes": (TINY,), "modes": (SEQUENTIAL, MICROBATCH, "auto"), "seconds": 0.1,
    "batch": 4, "context": 32, "output": 8, "until": 64, "stages": 3, "num-requests": 2,
    "batches": (1, 4), "contexts": (32, 64),
}  # fmt: skip
# Those that are asked for below, whatever the workload.
SOMETIMES = ("plot", "timeline", "stored", "shape", "shapes", "model", "layers")


def parse(description: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with the defaults of workload and device; `device` is resolved.

    Says what is wrong and exits with code 2, if so.
    """
    common = Parser(None, prog=PROGRAM, add_help=False)
    task = common.add_mutually_exclusive_group()
    task.add_argument("--workload", choices=WORKLOADS, default="decode",
                      help="what to measure; default: decode")  # fmt: skip
    for name in ("map", "curves"):
        task.add_argument(f"--{name}", dest="workload", action="store_const", const=name,
                          help=f"short for --workload {name}")  # fmt: skip
    common.add_argument("--device", default="auto", help="'auto', 'cpu', 'cuda' or 'cuda:N'")
    common.add_argument("--json", type=output(), metavar="FILE", help="write the JSON object there")
    early, _ = common.parse_known_args(argv)
    try:
        device = resolve_device(Config(device=early.device).device)
    except ValueError as error:
        common.error(str(error))

    parser = Parser(description, prog=PROGRAM, parents=[common])
    parser.set_defaults(**dict.fromkeys(SOMETIMES))
    own = WORKLOADS[early.workload]
    model = parser.add_mutually_exclusive_group() if "model" in own else parser
    for name, default in own.items():
        if device.type == "cpu":
            default = ON_CPU.get(name, default)
        group = model if name in ("shape", "model") else parser
        group.add_argument(f"--{name}", default=default, **OPTIONS[name])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"--workload {args.workload} does not take {' '.join(unknown)}")
    args.device = device
    written = [path.resolve() for path in (args.json, args.plot, args.timeline) if path]
    read = {path.resolve() for path in args.stored or ()}
    if len({*written}) < len(written) or read & {*written}:
        parser.error("--json, --plot, --timeline and --from must name different files")
    if args.model is not None:
        args.shape = None
    if args.layers is not None and not SIZES.keys() >= {*(args.shapes or [args.shape])}:
        parser.error("--layers is for random weights: a checkpoint has the layers that it has")
    return args
