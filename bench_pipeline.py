"""Measures decode in every pipeline mode, in turn in one run, on random weights of any Qwen3 shape.

python bench_pipeline.py                        Qwen3-0.6B's shape; without a GPU the tiny model
python bench_pipeline.py --shape 8B --batch 512 --context 512 --attention-sms 36 --ffn-sms 96
python bench_pipeline.py --model Qwen/Qwen3-4B --modes green auto --json result.json
python bench_pipeline.py --workload growing     contexts from 128 to 4096: all plans, and auto
python bench_pipeline.py --workload nano        nano-vllm's own benchmark, prefill included
python bench_pipeline.py --workload prefill     prompts alone, at the 8B shape
python bench_pipeline.py --map --plot map.png --json map.json    where the pipeline pays
python bench_pipeline.py --map --plot map.png --from map.json    the same picture, drawn again
python bench_pipeline.py --curves --plot curves.png              what SMs are worth to each stage

Prints a table and, as the last line, one JSON object; that of --map and --curves is long, so with
--json it goes there alone. A step's time is wall time, from the end of one step to the end of the
next: scheduling, model, and tokens on the host. Ratios are speed: above 1 is faster than
sequential. On a GPU, "of floor" says how near a step comes to the time in which weights and KV
cache can be read. Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from nanovllm.bench import BenchError, report
from nanovllm.bench.arms import Arm, Split, arm_specs, choose_split, open_arms
from nanovllm.bench.command_line import complete, make_parser
from nanovllm.bench.compare import StepTimes, compare, profile_steps
from nanovllm.bench.curves import draw_curves, format_curves, measure_curves
from nanovllm.bench.engines import StartedEngine, start_engine
from nanovllm.bench.floor import Floor, measure_copy_bandwidth
from nanovllm.bench.growing import Growth, growing_record, run_passages
from nanovllm.bench.growing_report import format_growing
from nanovllm.bench.heat_map import draw_map
from nanovllm.bench.map_report import format_map
from nanovllm.bench.nano import MAX_MODEL_LEN, run_nano
from nanovllm.bench.power import PowerLog, Reading, command_for
from nanovllm.bench.prefill import (
    format_prefill,
    measure_matmul_peak,
    prefill_record,
    run_prefill,
)
from nanovllm.bench.stored import read_map, read_record, write_record
from nanovllm.bench.sweep import Grid, sweep
from nanovllm.bench.workload import DecodeWorkload, fill_cache, room_options
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import sm_count
from nanovllm.engine.planned_decode import splits_to_try
from nanovllm.utils.timeline import save_timeline

Record = dict[str, Any]
# Their JSON objects are too long for a terminal.
LONG = ("map", "curves")


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args(argv)
    try:
        complete(args)
        record = RUN[args.task](args)
    except BenchError as error:
        parser.error(str(error))
    write_record(record, args.json)
    if args.json is None or args.task not in LONG:
        print(json.dumps(record))


def run_decode(args: argparse.Namespace) -> Record:
    """Compares the modes; prints the table and returns the JSON object."""
    workload = DecodeWorkload(args.batch, args.context, args.output)
    options = room_options(args.device, args.batch, workload.max_len)
    options["max_model_len"] = max(Config.max_model_len, workload.max_len)
    with start(args, **options) as started:
        engine = started.engine
        workload.check_fits(engine)
        fill_cache(engine)
        floor = None
        if args.device.type == "cuda":
            bandwidth = measure_copy_bandwidth(args.device)
            floor = Floor.of(engine.model_runner.model, workload, bandwidth)
        with open_arms(engine, arm_specs(args.modes, [], split_of(args))) as arms:
            times, readings = compare_steps(args, engine, arms, workload)
            record = report.describe_run(started, "decode steps")
            record |= report.decode_record(workload, floor, arms, times, readings)
            if args.timeline is not None:
                save_timeline(profile_steps(engine, arms[-1], workload), args.timeline)
    print(report.format_decode(record))
    return record


def compare_steps(
    args: argparse.Namespace, engine: LLMEngine, arms: list[Arm], workload: DecodeWorkload
) -> tuple[dict[str, StepTimes], dict[str, Reading]]:
    """Step times by label, and what the GPU drew meanwhile, if that is asked for."""
    if not args.power:
        return compare(engine, arms, workload, args.seconds), {}
    with PowerLog(command_for(args.device)) as log:
        times = compare(engine, arms, workload, args.seconds, log.watch)
        return times, log.readings()


def run_growing(args: argparse.Namespace) -> Record:
    """Measures all arms on growing sequences; prints the table and returns the JSON object."""
    growth = Growth(args.batch, args.context, args.until, args.stages, args.output)
    options = room_options(args.device, args.batch, growth.largest.max_len)
    with start(args, **options) as started:
        engine = started.engine
        growth.largest.check_fits(engine)
        fill_cache(engine)
        with open_arms(engine, arm_specs(args.modes, splits_of(args), split_of(args))) as arms:
            passages = run_passages(engine, arms, growth, args.rounds)
            record = report.describe_run(started, "growing")
            record |= growing_record(growth, arms, passages)
    print(format_growing(record))
    return record


def run_nano_workload(args: argparse.Namespace) -> Record:
    """Runs nano-vllm's benchmark; prints the result and returns the JSON object."""
    options: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN}
    if args.mode != "sequential":
        options |= {"enable_pipeline": True, "pipeline_mode": args.mode}
        sms = split_of(args)
        if sms is not None:
            options |= {"pipeline_attention_sm_count": sms[0], "pipeline_ffn_sm_count": sms[1]}
    with start(args, **options) as started:
        result = run_nano(started.engine, args.requests)
        record = report.describe_run(started, "nano")
        record |= report.nano_record(started.engine.model_runner, result)
    print(report.format_nano(record))
    return record


def run_prefill_workload(args: argparse.Namespace) -> Record:
    """Measures prefill; prints the result and returns the JSON object."""
    options = room_options(args.device, args.requests, args.tokens + 1)
    options["max_num_batched_tokens"] = args.requests * args.tokens
    options["enforce_eager"] = True  # graphs are for decode, which nothing reaches
    with start(args, **options) as started:
        runner = started.engine.model_runner
        result = run_prefill(started.engine, args.requests, args.tokens)
        dtype = runner.model.model.embed_tokens.weight.dtype
        record = report.describe_run(started, "prefill")
        record |= prefill_record(result, measure_matmul_peak(runner.device, dtype))
    print(format_prefill(record))
    return record


def run_map(args: argparse.Namespace) -> Record:
    """Measures the map, or reads it; prints and draws it, and returns the JSON object."""
    if args.stored is not None:
        record = read_map(args.stored)
    else:
        specs = arm_specs(args.modes, splits_of(args), split_of(args))
        grid = Grid(args.shapes, args.layers, args.batches, args.contexts, specs, args.seconds)
        record = sweep(
            grid, args.device, engine_options(args), lambda part: write_record(part, args.json)
        )
    print(format_map(record))
    if args.plot is not None:
        draw_map(record, args.plot)
    return record


def run_curves(args: argparse.Namespace) -> Record:
    """Measures the curves, or reads them; prints and draws them, and returns the JSON object."""
    if args.stored is not None:
        record = read_record(args.stored[0], "curves")
    else:
        record = measure_curves(args.device)
    print(format_curves(record))
    if args.plot is not None:
        draw_curves(record, args.plot)
    return record


def split_of(args: argparse.Namespace) -> Split | None:
    """SMs of attention and FFN to ask for; None where there are no SMs."""
    return choose_split(sm_count(args.device), args.attention_sms, args.ffn_sms)


def splits_of(args: argparse.Namespace) -> list[Split]:
    """SMs of each green arm; none where there are no SMs."""
    return args.splits or splits_to_try(sm_count(args.device))


def start(args: argparse.Namespace, **options: Any) -> AbstractContextManager[StartedEngine]:
    """The engine of a workload."""
    options = engine_options(args) | options
    return start_engine(args.shape, args.layers, args.model, **options)


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of `Config` that the command line says directly."""
    return {
        "device": str(args.device),
        "enforce_eager": args.enforce_eager,
        "async_scheduling": not args.sync,
    }


RUN = {
    "decode": run_decode,
    "growing": run_growing,
    "nano": run_nano_workload,
    "prefill": run_prefill_workload,
    "map": run_map,
    "curves": run_curves,
}


if __name__ == "__main__":
    main()
