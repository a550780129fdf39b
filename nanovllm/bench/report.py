"""Tables for people, and what a JSON object says of the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch.utils.collect_env import get_nvidia_driver_version, run

from nanovllm.bench import BenchError
from nanovllm.utils.device import sm_count
from nanovllm.utils.json_files import read_object

Record = dict[str, Any]
PACKAGES = ("torch", "triton", "transformers", "cuda-bindings")


def describe_machine(device: torch.device, benchmark: str) -> Record:
    """Where and when; `benchmark` is the record's kind. None for what is not known."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    driver = get_nvidia_driver_version(run)
    installed = {each.name: each.version for each in distributions()}
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": {"type": device.type, "name": name, "sms": sm_count(device) or None},
        "versions": {name: installed.get(name) for name in PACKAGES} | {"driver": driver},
    }


def title(record: Record) -> str:
    """Model and devices in a line."""
    model, ranks = record["model"], record.get("ranks", 1)
    return (
        f"{model['name']}: {model['layers']} layers, {model['parameters'] / 1e6:,.0f} M "
        f"parameters in {model['dtype']}, on {f'{ranks} x ' * (ranks > 1)}"
        f"{record['device']['name']}"
    )


def sms(arm: Record) -> str:
    """SMs that were granted to each lane."""
    lanes = arm["lane_sms"].values()
    return "+".join(map(str, lanes)) if lanes and all(lanes) else "all"


def fallbacks(arms: Iterable[Record]) -> list[str]:
    """A line for each arm that is not timed."""
    return [
        f"{arm['label']} is not timed, falls back: {arm['fallback_reason']}"
        for arm in arms
        if arm["fallback_reason"] is not None
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Aligned lines of rows by column, the first to the left."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def write_record(record: Record, path: Path | None) -> Record | None:
    """Writes a record as one line of JSON, all of it or nothing, and returns it.

    Does nothing without a path, and returns None.
    """
    if path is None:
        return None
    text, path = json.dumps(record) + "\n", path.resolve()
    if path.exists() and not path.is_file():  # a pipe or a device, which must stay one
        path.write_text(text, encoding="utf-8")
    else:
        part = path.with_name(f"{path.name}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    return record


def read_record(path: Path, benchmark: str) -> Record:
    """A record that `write_record` wrote.

    Raises:
        BenchError: there is no such file, or it holds no record of that benchmark.
    """
    record = read_object(path, BenchError)
    if record.get("benchmark") != benchmark:
        raise BenchError(f"{path} does not hold the JSON object of a --{benchmark} run")
    return record
