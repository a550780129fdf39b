"""Decode steps of the modes side by side, at one batch and context."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from nanovllm.bench import report
from nanovllm.bench.arms import SEQUENTIAL, Arm, specs_of
from nanovllm.bench.ceilings import copy_bandwidth, decode_floor
from nanovllm.bench.power import PowerLog
from nanovllm.bench.report import Record
from nanovllm.bench.turns import (
    DecodeWorkload,
    Times,
    measure,
    run_turn,
    start_arms,
    timed_arms,
)
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.stage_times import Span
from nanovllm.utils.timeline import save_timeline

MEASURED = ("steps", "step_ms", "tokens_per_second", "ratio", "bandwidth", "floor_share", "power")


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Compares the modes; yields the record after each block of rounds."""
    workload = DecodeWorkload(args.batch, args.context, args.output)
    max_len = max(Config.max_model_len, workload.max_len)
    with ExitStack() as stack:
        started = start_arms(args, specs_of(args), workload, max_model_len=max_len)
        engine, arms, about = stack.enter_context(started)
        record = (
            report.describe_machine(args.device, "decode steps")
            | about
            | {
                "batch": workload.batch,
                "context": workload.context,
                "output": workload.output,
                "mean_context": workload.mean_context,
                "floor": None,
            }
        )
        if args.device.type == "cuda":
            bandwidth = copy_bandwidth(args.device)
            record["floor"] = decode_floor(engine.model_runner, workload, bandwidth)
        log = stack.enter_context(PowerLog(args.device)) if args.power else None
        timed = timed_arms(arms, workload.batch)
        watch = log.watch if log else iter
        for times in measure(engine, timed, workload, args.seconds, watch):
            yield record | {"arms": [describe_arm(arm, record, times) for arm in arms]}
        if log:
            power = log.readings()
            yield record | {"arms": [describe_arm(arm, record, times, power) for arm in arms]}
        if args.timeline is not None:
            save_timeline(profile_steps(engine, arms[-1], workload), str(args.timeline))


def describe_arm(
    arm: Arm, record: Record, times: dict[str, Times], power: dict[str, Record] | None = None
) -> Record:
    """The record of an arm; if it falls back, all that would be measured is None."""
    statistics, own = arm.step_runner.statistics, times.get(arm.label)
    described: Record = {
        **arm.describe(record["batch"]),
        "runs_as": SEQUENTIAL if arm.mode == SEQUENTIAL else statistics.mode,
        "steps_by_path": dict(statistics.steps),
        **dict.fromkeys(MEASURED),
    }
    if own is None:
        return described
    ms = own["step_ms"]["median"]
    described |= own
    described["tokens_per_second"] = record["batch"] / ms * 1e3
    described["ratio"] = times[SEQUENTIAL]["step_ms"]["median"] / ms
    if floor := record["floor"]:
        described["bandwidth"] = floor["copy_bandwidth"] * floor["step_ms"] / ms
        described["floor_share"] = floor["step_ms"] / ms
    if power and arm.label in power:
        reading = power[arm.label]
        described["power"] = reading | {"joules_per_step": reading["watts"] * ms * 1e-3}
    return described


def profile_steps(engine: LLMEngine, arm: Arm, workload: DecodeWorkload) -> list[list[Span]]:
    """The stages of the last decode steps of a turn, timed; the arm is slower meanwhile."""
    arm.activate()
    configs = (engine.config, arm.step_runner.config)
    for config in configs:
        config.pipeline_enable_profiling = True
    try:
        run_turn(engine, workload)
    finally:
        for config in configs:
            config.pipeline_enable_profiling = False
    return list(arm.step_runner.statistics.recent)


def describe(record: Record) -> str:
    """The table of the compared modes."""
    end = record["context"] + record["output"]
    lines = [
        report.title(record),
        f"{record['batch']} sequences, context {record['context']} to {end}, beginning again "
        "every turn",
    ]
    if floor := record["floor"]:
        lines.append(
            f"floor {floor['step_ms']:.3f} ms: {floor['weight_bytes'] / 1e9:.2f} GB of weights and "
            f"{floor['kv_bytes'] / 1e9:.2f} GB of KV at {floor['copy_bandwidth'] / 1e12:.2f} TB/s "
            "(copy)"
        )
    rows = [columns(arm) for arm in record["arms"] if arm["step_ms"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[row.get(name, "-") for name in names] for row in rows]
    lines += report.fallbacks(record["arms"])
    return "\n".join([*lines, "", *report.table([names, *cells])])


def columns(arm: Record) -> dict[str, Any]:
    """The cells of an arm, by column."""
    ms = arm["step_ms"]
    cells = {
        "mode": arm["mode"],
        "SMs": report.sms(arm),
        "ms/step": f"{ms['median']:.3f}",
        "q1 to q3": f"{ms['q1']:.3f} to {ms['q3']:.3f}",
        "tokens/s": f"{arm['tokens_per_second']:,.0f}",
        "ratio": f"{arm['ratio']:.3f}",
    }
    if arm["bandwidth"] is not None:
        cells["TB/s"] = f"{arm['bandwidth'] / 1e12:.2f}"
        cells["of floor"] = f"{arm['floor_share']:.0%}"
    if power := arm["power"]:
        cells["W"], cells["MHz"] = f"{power['watts']:.0f}", f"{power['sm_mhz']:.0f}"
        cells["J/step"] = f"{power['joules_per_step']:.2f}"
    return cells
