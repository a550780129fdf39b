"""Decode steps of the modes side by side, at one batch and context."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack

from nanovllm.bench import BenchError, report
from nanovllm.bench.arms import SEQUENTIAL, Arm, arm_specs, timed_arms
from nanovllm.bench.ceilings import copy_bandwidth, decode_floor
from nanovllm.bench.power import check_power, read_samples, sampling
from nanovllm.bench.report import Record
from nanovllm.bench.turns import DecodeWorkload, measure, run_turn, start_arms, step_times
from nanovllm.config import Config
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.stage_times import Span
from nanovllm.utils.timeline import save_timeline

# The cells of an arm, out of its record.
COLUMNS = {
    "mode": "{mode}",
    "SMs": "{sms}",
    "ms/step": "{step_ms[median]:.3f}",
    "q1 to q3": "{step_ms[q1]:.3f} to {step_ms[q3]:.3f}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "ratio": "{ratio:.3f}",
}
FLOOR_COLUMNS = {"TB/s": "{terabytes_per_second:.2f}", "of floor": "{floor_share:.0%}"}
POWER_COLUMNS = {"W": "{watts:.0f}", "MHz": "{sm_mhz:.0f}", "J/step": "{joules_per_step:.2f}"}


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Compares the modes; yields the record after each round."""
    if args.power:
        check_power(args.device)
    if args.timeline is not None and args.tensor_parallel_size > 1:
        raise BenchError("--timeline needs --tensor-parallel-size 1")
    workload = DecodeWorkload(args.batch, args.context, args.output)
    max_len = max(Config.max_model_len, workload.max_len)
    with ExitStack() as stack:
        started = start_arms(args, arm_specs(args), workload, max_model_len=max_len)
        engine, arms, about = stack.enter_context(started)
        record = report.describe_machine(args.device, "decode steps") | about
        record |= dataclasses.asdict(workload) | {"floor": None}
        if args.device.type == "cuda":
            bandwidth = copy_bandwidth(args.device)
            record["floor"] = decode_floor(engine.model_runner, workload, bandwidth)
        samples = stack.enter_context(sampling(args.device)) if args.power else None
        for turns in measure(engine, timed_arms(arms, args.batch), workload, args.seconds):
            times = step_times(turns)
            reference = times[SEQUENTIAL]["step_ms"]["median"]
            records = [describe_arm(arm, record, times.get(arm.label), reference) for arm in arms]
            yield record | {"arms": records}
        if samples:
            power = read_samples(samples, turns)
            for arm in records:
                if reading := power.get(arm["label"]):
                    joules = reading["watts"] * arm["step_ms"]["median"] * 1e-3
                    arm |= reading | {"joules_per_step": joules}
            yield record | {"arms": records}
        if args.timeline is not None:
            last, path = arms[-1], str(args.timeline)
            title = (
                f"{record['model']['name']} on {record['device']['name']}, {args.batch} sequences "
                f"of {args.context} tokens, {last.label} on {report.sms(records[-1])} SMs"
            )
            steps, ordinary = profile_steps(engine, last, workload), None
            if len(arms) > 1 and path.endswith(".png"):
                ordinary = profile_steps(engine, arms[0], workload)
            save_timeline(steps, path, title, ordinary)


def describe_arm(arm: Arm, record: Record, times: Record | None, reference_ms: float) -> Record:
    """The record of an arm, without times if it falls back."""
    described = arm.describe(record["batch"])
    if times is None:
        return described
    ms = times["step_ms"]["median"]
    described |= times
    described |= {"tokens_per_second": record["batch"] / ms * 1e3, "ratio": reference_ms / ms}
    if floor := record["floor"]:
        needed = floor["weight_bytes"] + floor["kv_bytes"]
        described["terabytes_per_second"] = needed / ms * 1e-9
        described["floor_share"] = floor["step_ms"] / ms
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
    lines = [
        report.title(record),
        f"{record['batch']} sequences, context {record['context']} to "
        f"{record['context'] + record['output']}, beginning again every turn",
    ]
    columns = COLUMNS
    if floor := record["floor"]:
        columns = columns | FLOOR_COLUMNS
        lines.append(
            f"floor {floor['step_ms']:.3f} ms: {floor['weight_bytes'] / 1e9:.2f} GB of weights and "
            f"{floor['kv_bytes'] / 1e9:.2f} GB of KV at {floor['copy_bandwidth'] / 1e12:.2f} TB/s "
            "(copy)"
        )
    rows = []
    for arm in record["arms"]:
        if "step_ms" in arm:
            cells = columns | (POWER_COLUMNS if "watts" in arm else {})
            fields = arm | {"sms": report.sms(arm)}
            rows.append({name: cell.format_map(fields) for name, cell in cells.items()})
    return "\n".join([*lines, *report.fallbacks(record["arms"]), "", *report.table(rows)])
