"""What a map says: how much each arm gains over sequential decode, where, and in which regions.

A gain is speed: sequential step time over the arm's, so above 1 is faster. These functions know
nothing of engines; they read and write the plain values that a map's JSON file holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from nanovllm.bench.arms import AUTO, SEQUENTIAL

# "auto" keeps its promise where it is no slower than sequential, and near the best of all arms.
LEAST_AUTO_GAIN = 0.99
AUTO_TOLERANCE = 0.02
# A region is worth naming from this gain on.
REGION_GAIN = 1.05

Cell = tuple[int, int]


def judge(step_ms: Mapping[str, float]) -> dict[str, Any]:
    """The fields of a point that follow from its arms' step times.

    Args:
        step_ms: median by label; "sequential" is one of them.

    Returns:
        gains: by label, without sequential.
        best, best_gain: the fastest arm that is neither sequential nor auto; None if there is none.
        auto_gain, auto_of_best: of auto, over sequential and over the fastest arm of all; None
            without auto.
        auto_holds: whether auto keeps its promise; None without auto.
    """
    reference = step_ms[SEQUENTIAL]
    gains = {label: reference / time for label, time in step_ms.items() if label != SEQUENTIAL}
    fixed = {label: gain for label, gain in gains.items() if label != AUTO}
    best = max(fixed, key=lambda label: fixed[label], default=None)
    auto_gain = gains.get(AUTO)
    of_best = None if auto_gain is None else min(step_ms.values()) / step_ms[AUTO]
    holds = None
    if auto_gain is not None and of_best is not None:
        holds = auto_gain >= LEAST_AUTO_GAIN and of_best >= 1 / (1 + AUTO_TOLERANCE)
    return {
        "gains": gains,
        "best": best,
        "best_gain": None if best is None else fixed[best],
        "auto_gain": auto_gain,
        "auto_of_best": of_best,
        "auto_holds": holds,
    }


def summarize(shapes: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, extremes and regions of all shapes of a map; None for what was not measured."""
    points = [(shape["name"], point) for shape in shapes for point in shape["points"]]
    measured = [(name, point) for name, point in points if point["reason"] is None]
    with_auto = [pair for pair in measured if pair[1]["auto_gain"] is not None]
    with_best = [pair for pair in measured if pair[1]["best_gain"] is not None]
    worst = min(with_auto, key=lambda pair: pair[1]["auto_gain"], default=None)
    best = max(with_best, key=lambda pair: pair[1]["best_gain"], default=None)
    return {
        "points": len(measured),
        "not_measured": len(points) - len(measured),
        "worst_auto": None if worst is None else place(*worst, "auto_gain"),
        "auto_points": len(with_auto),
        "auto_fails": [
            place(name, point, "auto_gain", "auto_of_best")
            for name, point in with_auto
            if not point["auto_holds"]
        ],
        "best": None if best is None else place(*best, "best_gain", "best"),
        "regions": [region for shape in shapes for region in regions(shape)],
    }


def place(name: str, point: Mapping[str, Any], *fields: str) -> dict[str, Any]:
    """Where a point is, and some of its fields."""
    where = {"shape": name, "batch": point["batch"], "context": point["context"]}
    return where | {field: point[field] for field in fields}


def regions(shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Connected points of a shape whose best gain is at least `REGION_GAIN`, the largest first.

    Connected are neighbours in the list of batches or in that of contexts.
    """
    gains: dict[Cell, float] = {
        (point["batch"], point["context"]): point["best_gain"]
        for point in shape["points"]
        if point["best_gain"] is not None and point["best_gain"] >= REGION_GAIN
    }
    batches, contexts = axes(shape)
    unseen = set(gains)
    found: list[set[Cell]] = []
    while unseen:
        found.append(connected(min(unseen), unseen, batches, contexts))
        unseen -= found[-1]
    return [
        {
            "shape": shape["name"],
            "cells": [list(cell) for cell in sorted(region)],
            "least_gain": min(gains[cell] for cell in region),
            "most_gain": max(gains[cell] for cell in region),
        }
        for region in sorted(found, key=len, reverse=True)
    ]


def axes(shape: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The batches and the contexts of a shape's points, rising."""
    batches, contexts = (
        sorted({point[field] for point in shape["points"]}) for field in ("batch", "context")
    )
    return batches, contexts


def connected(
    start: Cell, cells: Collection[Cell], batches: list[int], contexts: list[int]
) -> set[Cell]:
    """All of `cells` that can be reached from `start`, from neighbour to neighbour."""
    region, border = {start}, [start]
    while border:
        for neighbour in neighbours(border.pop(), batches, contexts):
            if neighbour in cells and neighbour not in region:
                region.add(neighbour)
                border.append(neighbour)
    return region


def neighbours(cell: Cell, batches: list[int], contexts: list[int]) -> Iterator[Cell]:
    row, column = batches.index(cell[0]), contexts.index(cell[1])
    for i, j in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
        if 0 <= i < len(batches) and 0 <= j < len(contexts):
            yield batches[i], contexts[j]
