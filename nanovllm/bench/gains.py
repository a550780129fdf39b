"""What a map says: how much each arm gains over sequential decode, and where.

A gain is speed: sequential step time over the arm's, so above 1 is faster. These functions know
nothing of engines; they read the plain values that a map's JSON file holds.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.bench import report
from nanovllm.bench.arms import AUTO, GREEN, SEQUENTIAL
from nanovllm.bench.report import Record

# "auto" keeps its promise where it is no slower than sequential, and near the best of all arms.
LEAST_AUTO_GAIN = 0.99
AUTO_TOLERANCE = 0.02
# Points are worth naming from this gain on.
LEAST_GAIN = 1.05


@dataclass
class Point:
    """A point of a map, judged."""

    shape: str
    batch: int
    context: int
    reason: str | None  # why it is not measured; None if it is
    sequential_ms: float
    plan: str | None  # that auto has in use
    gains: dict[str, float]  # of all arms that were timed but sequential, by label

    def __post_init__(self) -> None:
        fixed = [label for label in self.gains if label != AUTO]
        self.best = max(fixed, key=lambda label: self.gains[label], default=None)
        self.best_gain = None if self.best is None else self.gains[self.best]
        self.auto_gain = self.gains.get(AUTO)
        # Auto's speed over the fastest arm of all.
        self.auto_of_best = self.gains.get(AUTO, 1.0) / max([1.0, *self.gains.values()])

    @property
    def auto_fails(self) -> bool:
        """Whether there is an auto that does not keep its promise."""
        gain = self.auto_gain
        too_slow = self.auto_of_best < 1 / (1 + AUTO_TOLERANCE)
        return gain is not None and (gain < LEAST_AUTO_GAIN or too_slow)

    def __str__(self) -> str:
        return f"{self.shape} batch {self.batch} context {self.context}"


def judge(shape: Record) -> list[Point]:
    """The points of a shape."""
    points = []
    for point in shape["points"]:
        ms = {label: arm["step_ms"]["median"] for label, arm in point["arms"].items()}
        reference = ms.pop(SEQUENTIAL, 0.0)
        gains = {label: reference / own for label, own in ms.items()}
        place = shape["name"], point["batch"], point["context"]
        points.append(Point(*place, point["reason"], reference, point.get("plan"), gains))
    return points


def axes(points: list[Point]) -> tuple[list[int], list[int]]:
    """The batches and the contexts of points, rising."""
    return sorted({point.batch for point in points}), sorted({point.context for point in points})


def describe(record: Record) -> str:
    """The table of every shape, then the summary."""
    parts = ["\n".join(describe_shape(record, shape)) for shape in record["shapes"]]
    return "\n\n".join([*parts, "\n".join(summarize(record))])


def describe_shape(record: Record, shape: Record) -> list[str]:
    """The points of one shape, with the gain of each arm over sequential."""
    points = sorted(judge(shape), key=lambda point: (point.batch, point.context))
    if not shape["arms"]:
        return [f"{shape['name']}: not measured, {points[0].reason}"]
    labels = [arm["label"] for arm in shape["arms"] if arm["label"] != SEQUENTIAL]
    with_plans = any(point.plan for point in points)
    return [
        report.title({**record, **shape}),
        f"start-up {shape['startup_seconds']:.1f} s, {shape['kv_blocks']:,} KV blocks, "
        f"measured in {shape['seconds']:.0f} s; gains over sequential decode",
        *report.fallbacks(shape["arms"]),
        "",
        *report.table([cells(point, labels, with_plans) for point in points]),
    ]


def cells(point: Point, labels: list[str], with_plan: bool) -> dict[str, str]:
    """A row: "-" for an arm that cannot run there, "!" where auto fails."""
    row = {"batch": str(point.batch), "context": str(point.context)}
    if point.reason is not None:
        return row | {"seq. ms": "does not fit"}
    row["seq. ms"] = f"{point.sequential_ms:.3f}"
    for label in labels:
        gain = point.gains.get(label)
        row[short_label(label)] = "-" if gain is None else f"{gain:.3f}"
    if with_plan:
        row["auto's plan"] = short_label(point.plan or "-")
    row["best"] = short_label(point.best or "-") + ("  ! auto" if point.auto_fails else "")
    return row


def short_label(label: str) -> str:
    """A green arm by its split alone."""
    return label.removeprefix(f"{GREEN} ")


def summarize(record: Record) -> list[str]:
    """Number of points, where auto fails, and the points that gain."""
    points = [point for shape in record["shapes"] for point in judge(shape)]
    missing = sum(point.reason is not None for point in points)
    auto = sorted((point.auto_gain, str(point)) for point in points if point.auto_gain is not None)
    fails = [point for point in points if point.auto_fails]
    gains = sorted((p.best_gain, str(p), p.best) for p in points if p.best_gain is not None)
    lines = [
        f"{len(points) - missing} points in {record['sweep_seconds']:.0f} s, "
        f"{record['seconds_per_arm']:g} s of steps an arm"
        + (f"; {missing} more do not fit" if missing else "")
    ]
    if auto:
        lines.append(
            f"auto is at least {LEAST_AUTO_GAIN} and within {AUTO_TOLERANCE:.0%} of the best arm "
            f"at {len(auto) - len(fails)} of {len(auto)} points; worst: {auto[0][0]:.3f}, "
            f"{auto[0][1]}"
        )
    lines += [
        f"  not at {point}: {point.auto_gain:.3f}, {point.auto_of_best:.3f} of the best"
        for point in fails
    ]
    lines.append(f"best gains, at least {LEAST_GAIN}:")
    lines += [
        f"  {gain:.3f} at {place}, by {label}"
        for gain, place, label in reversed(gains)
        if gain >= LEAST_GAIN
    ]
    return lines
