"""What the pipeline did: tokens and steps by path, and, when profiled, the time of each stage."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nanovllm.engine.planner import Planner
from nanovllm.engine.stage_marks import Span

# Steps whose stages are kept for a timeline.
KEPT_STEPS = 32


@dataclass
class PipelineStatistics:
    """Counts and times of the decode steps of one engine.

    Attributes:
        mode: how steps are issued, one of `Config.pipeline_mode`'s values; "auto" with a planner.
        attention_sms, ffn_sms, device_sms: SMs granted to the stages, and the device's; None
            without partitions, and with several.
        planner: chooses how each step is issued, in mode "auto".
        fallback_reason: why there is no pipeline although one was asked for.
        steps, tokens: of pipelined and of sequential decode steps.
        profiled_steps: steps whose stages were timed.
        attention_ms, ffn_ms, total_ms, both_ms: sums over the profiled steps: each stage, the
            whole step, and the time in which both stages ran.
        recent: the stages of the last profiled steps.
    """

    mode: str = "sequential"
    attention_sms: int | None = None
    ffn_sms: int | None = None
    device_sms: int | None = None
    planner: Planner | None = None
    fallback_reason: str | None = None
    steps: dict[str, int] = field(default_factory=lambda: {"pipelined": 0, "sequential": 0})
    tokens: dict[str, int] = field(default_factory=lambda: {"pipelined": 0, "sequential": 0})
    profiled_steps: int = 0
    attention_ms: float = 0.0
    ffn_ms: float = 0.0
    total_ms: float = 0.0
    both_ms: float = 0.0
    recent: deque[list[Span]] = field(default_factory=lambda: deque(maxlen=KEPT_STEPS))

    def count_step(self, num_tokens: int, *, pipelined: bool) -> None:
        """Counts a decode step of `num_tokens` sequences."""
        path = "pipelined" if pipelined else "sequential"
        self.steps[path] += 1
        self.tokens[path] += num_tokens

    def add_times(self, spans: list[Span], total_ms: float) -> None:
        """Takes the stages of a profiled step that took `total_ms`."""
        self.profiled_steps += 1
        self.total_ms += total_ms
        self.attention_ms += sum(s.end_ms - s.start_ms for s in spans if s.stage == "attention")
        self.ffn_ms += sum(s.end_ms - s.start_ms for s in spans if s.stage == "ffn")
        self.both_ms += time_of_both(spans)
        self.recent.append(spans)

    def as_dict(self) -> dict[str, object]:
        """Everything as plain values; times are means per profiled step, None if there is none."""

        def mean(total: float) -> float | None:
            return total / self.profiled_steps if self.profiled_steps else None

        return {
            "total_tokens": sum(self.tokens.values()),
            "avg_attention_ms": mean(self.attention_ms),
            "avg_ffn_ms": mean(self.ffn_ms),
            "avg_total_ms": mean(self.total_ms),
            "mode": self.mode,
            "attention_sms": self.attention_sms,
            "ffn_sms": self.ffn_sms,
            "device_sms": self.device_sms,
            "steps": dict(self.steps),
            "tokens": dict(self.tokens),
            "profiled_steps": self.profiled_steps,
            "overlap_share": self.both_ms / self.total_ms if self.total_ms else None,
            "planner": None if self.planner is None else self.planner.as_dict(),
            "fallback_reason": self.fallback_reason,
        }

    def format(self) -> str:
        """The block that `print_pipeline_statistics` prints."""
        times = {
            "attention": self.attention_ms,
            "FFN": self.ffn_ms,
            "total": self.total_ms,
        }
        lines = ["[Pipeline Statistics]", f"  Total tokens processed: {sum(self.tokens.values())}"]
        for name, total in times.items():
            mean = (
                f"{total / self.profiled_steps:.2f} ms" if self.profiled_steps else "not profiled"
            )
            lines.append(f"  Avg {name} time: {mean}")
        lines.append(f"  Mode: {self.mode}{self._format_sms()}")
        for path, steps in self.steps.items():
            lines.append(
                f"  {path.capitalize()} decode: {self.tokens[path]} tokens in {steps} steps"
            )
        if self.total_ms:
            lines.append(f"  Both stages running: {self.both_ms / self.total_ms:.0%} of the time")
        if self.planner is not None:
            lines += [f"  {line}" for line in self.planner.lines()]
        if self.fallback_reason is not None:
            lines.append(f"  Fallback reason: {self.fallback_reason}")
        return "\n".join(lines)

    def _format_sms(self) -> str:
        if self.attention_sms is None:
            return ""
        return f" (attention {self.attention_sms}, FFN {self.ffn_sms} of {self.device_sms} SMs)"


def time_of_both(spans: list[Span]) -> float:
    """Time in ms in which an attention stage and an FFN stage ran, by a sweep over their ends."""
    ends = [(span.start_ms, 1, span.stage) for span in spans]
    ends += [(span.end_ms, -1, span.stage) for span in spans]
    active = {"attention": 0, "ffn": 0}
    total = previous = 0.0
    for moment, change, stage in sorted(ends):
        if all(active.values()):
            total += moment - previous
        active[stage] += change
        previous = moment
    return total
