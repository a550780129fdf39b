"""What the pipeline did: tokens and steps by path, and, when profiled, the time of each lane."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.auto.planner import Planner
from nanovllm.engine.plan import ATTENTION
from nanovllm.engine.stage_times import Span

# Steps whose works are kept for a timeline.
KEPT_STEPS = 32


@dataclass
class PipelineStatistics:
    """Counts and times of the decode steps of one engine."""

    mode: str = "sequential"  # how steps are issued, one of `Config.pipeline_mode`'s values
    # SMs granted to each lane, by name; empty without partitions, and with several splits.
    lane_sms: dict[str, int] = field(default_factory=dict)
    device_sms: int | None = None  # None where `lane_sms` is empty
    fallback_reason: str | None = None  # why there is no pipeline although one was asked for
    planner: Planner | None = None  # in mode "auto"
    steps: dict[str, int] = field(default_factory=lambda: {"pipelined": 0, "sequential": 0})
    tokens: dict[str, int] = field(default_factory=lambda: {"pipelined": 0, "sequential": 0})
    # Sums over the profiled steps: the works of each lane, the whole step, and the time in which
    # more than one lane worked.
    profiled_steps: int = 0
    lane_ms: dict[str, float] = field(default_factory=dict)
    total_ms: float = 0.0
    overlap_ms: float = 0.0
    # The works of the last profiled steps.
    recent: deque[list[Span]] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))

    def count_step(self, num_tokens: int, *, pipelined: bool) -> None:
        """Counts a decode step of `num_tokens` sequences."""
        path = "pipelined" if pipelined else "sequential"
        self.steps[path] += 1
        self.tokens[path] += num_tokens

    def add_times(self, spans: list[Span], total_ms: float) -> None:
        """Takes the works of a profiled step that took `total_ms`."""
        self.profiled_steps += 1
        self.total_ms += total_ms
        for span in spans:
            before = self.lane_ms.get(span.lane, 0.0)
            self.lane_ms[span.lane] = before + span.end_ms - span.start_ms
        self.overlap_ms += overlap(spans)
        self.recent.append(spans)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values; times are means per profiled step, None if there is none."""
        sums = (*attention_and_rest(self.lane_ms), self.total_ms)
        steps = self.profiled_steps
        attention_ms, ffn_ms, total_ms = (ms / steps if steps else None for ms in sums)
        attention_sms, ffn_sms = attention_and_rest(self.lane_sms) if self.lane_sms else (None,) * 2
        return {
            "total_tokens": sum(self.tokens.values()),
            "avg_attention_ms": attention_ms,
            "avg_ffn_ms": ffn_ms,
            "avg_total_ms": total_ms,
            "mode": self.mode,
            "attention_sms": attention_sms,
            "ffn_sms": ffn_sms,
            "device_sms": self.device_sms,
            "lane_sms": dict(self.lane_sms),
            "steps": dict(self.steps),
            "tokens": dict(self.tokens),
            "profiled_steps": steps,
            "overlap_share": self.overlap_ms / self.total_ms if self.total_ms else None,
            "planner": None if self.planner is None else self.planner.as_dict(),
            "fallback_reason": self.fallback_reason,
        }

    def format(self) -> str:
        """The block that `print_pipeline_statistics` prints."""
        values = self.as_dict()
        lines = [f"Total tokens processed: {values['total_tokens']}"]
        for name in ("attention", "FFN", "total"):
            mean = values[f"avg_{name.lower()}_ms"]
            lines.append(f"Avg {name} time: {'not profiled' if mean is None else f'{mean:.2f} ms'}")
        sms = f" ({format_sms(self.lane_sms)} of {self.device_sms} SMs)" if self.lane_sms else ""
        lines.append(f"Mode: {self.mode}{sms}")
        for path, steps in self.steps.items():
            lines.append(f"{path.capitalize()} decode: {self.tokens[path]} tokens in {steps} steps")
        if self.total_ms:
            share = self.overlap_ms / self.total_ms
            lines.append(f"Several lanes at work: {share:.0%} of the time")
        if self.planner is not None:
            lines += self.planner.lines()
        if self.fallback_reason is not None:
            lines.append(f"Fallback reason: {self.fallback_reason}")
        return "\n  ".join(["[Pipeline Statistics]", *lines])


def attention_and_rest(values: Mapping[str, float]) -> tuple[float, float]:
    """The value of the attention lane, and the sum of all others'."""
    attention = values.get(ATTENTION, 0)
    return attention, sum(values.values()) - attention


def format_sms(lane_sms: Mapping[str, int]) -> str:
    """Such as "attention 36, FFN 96"."""
    names = {"ffn": "FFN", "qkv": "QKV"}
    return ", ".join(f"{names.get(lane, lane)} {sms}" for lane, sms in lane_sms.items())


def overlap(spans: list[Span]) -> float:
    """Time in ms in which more than one lane worked, by a sweep over the ends of their works."""
    ends = [(span.start_ms, 1, span.lane) for span in spans]
    ends += [(span.end_ms, -1, span.lane) for span in spans]
    active: Counter[str] = Counter()
    total = previous = 0.0
    for moment, change, lane in sorted(ends):
        if sum(count > 0 for count in active.values()) > 1:
            total += moment - previous
        active[lane] += change
        previous = moment
    return total
