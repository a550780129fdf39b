"""What a benchmark prints: a table for people, and one JSON object for everything else."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from nanovllm.bench.arms import Arm
from nanovllm.bench.compare import StepTimes
from nanovllm.bench.engines import StartedEngine
from nanovllm.bench.floor import Floor
from nanovllm.bench.nano import NanoResult
from nanovllm.bench.power import Reading
from nanovllm.bench.workload import DecodeWorkload
from nanovllm.config import Config
from nanovllm.engine.model_runner import ModelRunner, sm_count
from nanovllm.engine.pipeline_statistics import PipelineStatistics

PACKAGES = ("torch", "triton", "transformers", "cuda-bindings")


def describe_run(started: StartedEngine, benchmark: str) -> dict[str, Any]:
    """What was measured, where, when, and with what."""
    device = started.engine.model_runner.device
    return describe_machine(device, benchmark) | describe_engine(started)


def describe_machine(device: torch.device, benchmark: str) -> dict[str, Any]:
    """Where and when; `benchmark` is the record's kind."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": describe_device(device),
        "versions": describe_versions(),
    }


def describe_engine(started: StartedEngine) -> dict[str, Any]:
    """The model, the engine's options, and how long it took to start."""
    model = started.engine.model_runner.model
    weight = model.model.embed_tokens.weight
    return {
        "model": {
            "name": started.name,
            "layers": model.num_layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(weight.dtype).removeprefix("torch."),
        },
        "options": changed_options(started.engine.config),
        "startup_seconds": started.startup_seconds,
    }


def describe_arm(arm: Arm) -> dict[str, Any]:
    """What an arm was to be, and the SMs that it was granted."""
    statistics = arm.step_runner.statistics
    return {
        "label": arm.label,
        "mode": arm.mode,
        "attention_sms": statistics.attention_sms,
        "ffn_sms": statistics.ffn_sms,
        "fallback_reason": statistics.fallback_reason,
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Name and size of a device; None for what is not known."""
    if device.type != "cuda":
        name = platform.processor() or platform.machine()
        return {"type": device.type, "name": name, "sms": None, "memory_gib": None}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": device.type,
        "name": properties.name,
        "sms": sm_count(device),
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def describe_versions() -> dict[str, str | None]:
    """Versions of everything that times depend on; None for what is not installed."""
    packages = {name.replace("-", "_"): installed_version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        **packages,
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None if there is none, or no nvidia-smi to ask."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def changed_options(config: Config) -> dict[str, Any]:
    """The engine's options that are not the defaults, but for the model."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Config)
        if field.name != "model" and getattr(config, field.name) != field.default
    }


def decode_record(
    workload: DecodeWorkload,
    floor: Floor | None,
    arms: list[Arm],
    times: dict[str, StepTimes],
    readings: Mapping[str, Reading],
) -> dict[str, Any]:
    """The JSON fields of compared decode steps; `times` has "sequential"."""
    reference = times["sequential"].median
    return {
        "batch": workload.batch,
        "context": workload.context,
        "output": workload.output,
        "mean_context": workload.mean_context,
        "floor": None if floor is None else floor_record(floor),
        "arms": [
            arm_record(arm, workload.batch, floor, times.get(arm.label), reference)
            | {"power": power_record(readings.get(arm.label), times.get(arm.label))}
            for arm in arms
        ],
    }


def floor_record(floor: Floor) -> dict[str, float]:
    return {
        "weight_bytes": floor.weight_bytes,
        "kv_bytes": floor.kv_bytes,
        "copy_bandwidth": floor.copy_bandwidth,
        "step_ms": floor.seconds * 1e3,
    }


def arm_record(
    arm: Arm, batch: int, floor: Floor | None, times: StepTimes | None, reference: float
) -> dict[str, Any]:
    """One arm; `times` is None if it fell back, and then so is everything measured."""
    record = {
        "mode": arm.mode,
        **pipeline_record(arm.step_runner.statistics),
        "fell_back": times is None,
        "fallback_reason": arm.fallback_reason(batch),
    }
    measured: dict[str, Any] = dict.fromkeys(
        ("steps", "step_ms", "tokens_per_second", "ratio", "bandwidth", "floor_share")
    )
    if times is not None:
        measured["steps"] = times.count
        measured["step_ms"] = {
            "median": times.median * 1e3,
            "q1": times.low * 1e3,
            "q3": times.high * 1e3,
        }
        measured["tokens_per_second"] = batch / times.median
        measured["ratio"] = reference / times.median
        if floor is not None:
            measured["bandwidth"] = floor.total_bytes / times.median
            measured["floor_share"] = floor.seconds / times.median
    return {**record, **measured}


def power_record(reading: Reading | None, times: StepTimes | None) -> dict[str, Any] | None:
    """What a GPU drew during an arm's steps; None if that was not measured."""
    if reading is None or times is None:
        return None
    return {**dataclasses.asdict(reading), "joules_per_step": reading.watts * times.median}


def pipeline_record(statistics: PipelineStatistics) -> dict[str, Any]:
    """How decode steps really ran: mode, SMs granted, and steps by path so far."""
    return {
        "runs_as": statistics.mode,
        "attention_sms": statistics.attention_sms,
        "ffn_sms": statistics.ffn_sms,
        "steps_by_path": dict(statistics.steps),
    }


def nano_record(runner: ModelRunner, result: NanoResult) -> dict[str, Any]:
    """The JSON fields of a run of nano-vllm's benchmark."""
    statistics = runner.step_runner.statistics
    fields = dataclasses.asdict(result)
    totals = fields.pop("steps")
    return {
        **fields,
        **totals,
        "output_tokens_per_second": result.tokens_per_second,
        **pipeline_record(statistics),
        "fell_back": statistics.fallback_reason is not None,
        "fallback_reason": statistics.fallback_reason,
    }


def format_title(record: dict[str, Any]) -> str:
    """Model and device in a line."""
    model, device = record["model"], record["device"]
    return (
        f"Qwen3 {model['name']}: {model['layers']} layers, {model['parameters'] / 1e6:,.0f} M "
        f"parameters in {model['dtype']}, on {device['name']}"
    )


def format_decode(record: dict[str, Any]) -> str:
    """The table of compared decode steps."""
    floor = record["floor"]
    head = f"{'mode':<11}{'SMs':>9}{'ms/step':>10}{'q1 to q3':>18}{'tokens/s':>11}{'ratio':>7}"
    lines = [
        format_title(record),
        f"{record['batch']} sequences, context {record['context']} to "
        f"{record['context'] + record['output']}, beginning again every turn",
    ]
    if floor is not None:
        gigabytes = (floor["weight_bytes"] / 1e9, floor["kv_bytes"] / 1e9)
        lines.append(
            f"floor {floor['step_ms']:.3f} ms: {gigabytes[0]:.2f} GB of weights and "
            f"{gigabytes[1]:.2f} GB of KV at {floor['copy_bandwidth'] / 1e12:.2f} TB/s (copy)"
        )
        head += f"{'TB/s':>7}{'of floor':>10}"
    if any(arm["power"] for arm in record["arms"]):
        head += f"{'W':>6}{'MHz':>7}{'J/step':>8}"
    return "\n".join([*lines, "", head, *map(format_arm, record["arms"])])


def format_arm(arm: dict[str, Any]) -> str:
    """A row of that table."""
    sms = "all" if arm["attention_sms"] is None else f"{arm['attention_sms']}+{arm['ffn_sms']}"
    if arm["fell_back"]:
        return f"{arm['mode']:<11}{'-':>9}  not timed, falls back: {arm['fallback_reason']}"
    step_ms = arm["step_ms"]
    spread = f"{step_ms['q1']:.3f} to {step_ms['q3']:.3f}"
    row = (
        f"{arm['mode']:<11}{sms:>9}{step_ms['median']:>10.3f}{spread:>18}"
        f"{arm['tokens_per_second']:>11,.0f}{arm['ratio']:>7.3f}"
    )
    if arm["bandwidth"] is not None:
        row += f"{arm['bandwidth'] / 1e12:>7.2f}{arm['floor_share']:>10.0%}"
    if power := arm["power"]:
        row += f"{power['watts']:>6.0f}{power['sm_mhz']:>7.0f}{power['joules_per_step']:>8.2f}"
    return row


def format_nano(record: dict[str, Any]) -> str:
    """A run of nano-vllm's benchmark in a few lines."""
    lines = [
        format_title(record),
        f"{record['requests']} requests: {record['prompt_tokens']:,} tokens in, "
        f"{record['output_tokens']:,} out, in {record['seconds']:.2f} s, decode "
        f"{record['runs_as']}",
        f"{record['output_tokens_per_second']:,.0f} output tokens per second",
        f"prefill steps take {record['prefill_seconds']:.2f} s of it, decode steps "
        f"{record['decode_seconds']:.2f} s",
    ]
    if record["gpu_idle_share"] is not None:
        lines.append(
            f"between decode steps the GPU is idle for {record['gpu_idle_share']:.2%} of the time "
            f"({record['gpu_idle_gaps']:,} gaps)"
        )
    if record["fell_back"]:
        lines.append(f"The pipeline fell back: {record['fallback_reason']}")
    return "\n".join(lines)
