"""Every step of an engine's run: when the device worked on it, and what it computed.

    with StepLog(engine.model_runner) as log:
        engine.generate(prompts, params)
    log.totals()

A step's work lies between two timing events, one before the model, one after its tokens have been
copied to the host. Nobody waits for them until `totals`. On the CPU, where a step is done when it
has been issued, the clock serves instead.

An event before a step is not quite where its work begins. If the device has run dry, the event
happens at once, and the graph behind it only after the host has launched it, which takes long for a
graph of hundreds of kernels. So wherever the step before had ended by the time a graph was
launched, all of the launch counts as idle: rather a little too much than too little.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from nanovllm.bench.report import Record
from nanovllm.engine.model_runner import ModelRunner, ignore
from nanovllm.engine.scheduler import Step
from nanovllm.engine.stage_times import StageTimer


@dataclass
class LoggedStep:
    """A step that has been issued."""

    is_decode: bool
    # Events around its work.
    begin: Any = None
    end: Any = None
    # Ids of the requests for which it draws a token.
    drawn: list[int] = field(default_factory=list)
    # Of prefill: request id, first token, and the one behind the last.
    chunks: list[tuple[int, int, int]] = field(default_factory=list)
    launch_seconds: float = 0.0  # after `begin`, in which the device had nothing to do yet
    tokens_at: float = 0.0  # when its tokens were on the host, by `time.perf_counter`

    @property
    def seconds(self) -> float:
        """Time of its work."""
        return self.begin.elapsed_time(self.end) * 1e-3 - self.launch_seconds


class StepLog:
    """Logs all steps of a runner while its `with` block runs."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.on_gpu = runner.device.type == "cuda"
        self.mark = StageTimer(runner.device).mark
        self.has_graphs = runner.graph_memory is not None
        self.steps: list[LoggedStep] = []
        self.collected = 0
        self.began = 0.0

    def __enter__(self) -> StepLog:
        self.runner.watch = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.runner.watch = ignore

    def __call__(self, moment: str, step: Step) -> None:
        """See `ModelRunner.watch`."""
        if moment == "tokens":
            self.steps[self.collected].tokens_at = time.perf_counter()
            self.collected += 1
        elif moment == "begin":
            self.steps.append(LoggedStep(step.is_decode, self.mark()))
            self.began = time.perf_counter()
        elif moment == "issued":
            is_graph = self.has_graphs and step.is_decode
            if is_graph and len(self.steps) > 1 and self.steps[-2].end.query():
                self.steps[-1].launch_seconds = time.perf_counter() - self.began
        else:  # the device has work now, so the host has time
            logged = self.steps[-1]
            logged.end = self.mark()
            logged.drawn = [c.seq.request_id for c in step.chunks if c.needs_sample]
            if not step.is_decode:
                logged.chunks = [(c.seq.request_id, c.start, c.end) for c in step.chunks]

    def totals(self) -> Record:
        """Sums over all steps so far; waits for the last one. See also `count_tokens`.

        Seconds are those of work on the device. `gpu_idle_share` is that of the time from the first
        to the last of decode steps with no prefill between them, in which the GPU had nothing to
        do; None on the CPU, and without such steps.
        """
        self.runner.synchronize()
        prefill = [step for step in self.steps if not step.is_decode]
        decode = [step for step in self.steps if step.is_decode]
        pairs = [(a, b) for a, b in pairwise(self.steps) if a.is_decode and b.is_decode]
        idle = sum(a.end.elapsed_time(b.begin) * 1e-3 + b.launch_seconds for a, b in pairs)
        total = idle + sum(a.seconds for a, _ in pairs)
        return {
            "prefill_seconds": sum(step.seconds for step in prefill),
            "prefill_tokens": sum(end - start for s in prefill for _, start, end in s.chunks),
            "decode_seconds": sum(step.seconds for step in decode),
            "decode_tokens": sum(len(step.drawn) for step in decode),
            **count_tokens(self.steps),
            "gpu_idle_share": idle / total if self.on_gpu and total else None,
        }


def count_tokens(steps: list[LoggedStep]) -> Record:
    """What can be told from the steps of each request.

    Returns:
        recomputed_tokens: that were read though an earlier step had computed them.
        inter_token_ms: median and 99th percentile of the time between two tokens of a request;
            None without any.
    """
    computed: Counter[int] = Counter()  # tokens in the KV cache at some time, by request
    last: dict[int, float] = {}
    recomputed, gaps = 0, []
    for step in steps:
        for request, start, end in step.chunks:
            recomputed += max(0, min(end, computed[request]) - start)
            computed[request] = max(computed[request], end)
        for request in step.drawn:
            computed[request] += step.is_decode
            if request in last:
                gaps.append((step.tokens_at - last[request]) * 1e3)
            last[request] = step.tokens_at
    middle, high = np.percentile(gaps, [50, 99]).tolist() if gaps else (None, None)
    return {
        "recomputed_tokens": recomputed,
        "inter_token_ms": {"median": middle, "p99": high} if gaps else None,
    }
