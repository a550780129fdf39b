"""Records of earlier runs, read back to be drawn again without measuring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanovllm.bench import BenchError
from nanovllm.bench.gains import summarize
from nanovllm.bench.shapes import SIZES


def write_record(record: dict[str, Any], path: Path | None) -> None:
    """Writes a record as one line of JSON; does nothing without a path."""
    if path is not None:
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")


def read_record(path: Path, benchmark: str) -> dict[str, Any]:
    """A record that `write_record` wrote.

    Raises:
        BenchError: there is no such file, or it holds no record of that benchmark.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchError(f"--from {path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("benchmark") != benchmark:
        raise BenchError(f"--from {path} does not hold the JSON object of a --{benchmark} run")
    return record


def read_map(paths: Sequence[Path]) -> dict[str, Any]:
    """One map of several files: all their shapes by size, and of a point in two files the last.

    Each shape keeps the date and the seconds an arm of the file that it comes from.

    Raises:
        BenchError: a file is not a map, or they come from different machines.
    """
    records = [read_record(path, "map") for path in paths]
    first, *others = records
    for path, other in zip(paths[1:], others, strict=True):
        for field in ("device", "versions"):
            if other[field] != first[field]:
                raise BenchError(
                    f"--from {paths[0]} {path}: {field} differ, so they make no one map"
                )
    shapes: dict[str, dict[str, Any]] = {}
    for record in records:
        origin = {key: record[key] for key in ("date", "seconds_per_arm")}
        for shape in record["shapes"]:
            name, dated = shape["name"], origin | shape
            shapes[name] = merge_shapes(shapes[name], dated) if name in shapes else dated
    by_size = [name for name in SIZES if name in shapes]
    rest = [name for name in shapes if name not in by_size]
    merged = records[-1] | {"shapes": [shapes[key] for key in [*rest, *by_size]]}
    merged["seconds_per_arm"] = min(record["seconds_per_arm"] for record in records)
    merged["sweep_seconds"] = sum(record["sweep_seconds"] for record in records)
    return merged | {"summary": summarize(merged["shapes"])}


def merge_shapes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The arms, in the new order, and points of both.

    Raises:
        BenchError: they have different numbers of layers.
    """
    if "model" in old and "model" in new and old["model"] != new["model"]:
        raise BenchError(f"--from: {new['name']} does not have as many layers in all files")
    points = {(p["batch"], p["context"]): p for p in [*old["points"], *new["points"]]}
    labels = {arm["label"] for arm in new["arms"]}
    arms = [*new["arms"], *(arm for arm in old["arms"] if arm["label"] not in labels)]
    return old | new | {"arms": arms, "points": list(points.values())}
