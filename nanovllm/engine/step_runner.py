"""Runs steps of one rank: from CUDA graphs or eagerly, timed or not, by whatever plan they name.

    launched step:  prepare (layout and inputs, on the host)  ->  run (logits)  ->  finish (counts)

All plans of the engine stand ready in a list, which is the same on every rank. Plan 0 is sequential
and runs what no other does: prompts, and decode steps with too few sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from nanovllm.config import Config
from nanovllm.engine.draws import NO_DRAWS, Draws
from nanovllm.engine.graph_memory import GraphMemory
from nanovllm.engine.pipeline_modes import Pipelines
from nanovllm.engine.pipeline_scheduler import PipelineScheduler, hidden_states
from nanovllm.engine.plan import SEQUENTIAL_NUMBER, Choice
from nanovllm.engine.scheduler import Chunk, Step
from nanovllm.engine.stage_times import StageTimer
from nanovllm.engine.step_inputs import (
    StepInputs,
    StepLayout,
    balance,
    decode_first,
    micro_batches,
)


class FixedChooser:
    """Chooses the last plan for all steps that have enough sequences, sequential for the rest."""

    def __init__(self, schedulers: Sequence[PipelineScheduler], memory: GraphMemory | None) -> None:
        self.last, self.fewest = len(schedulers) - 1, schedulers[-1].plan.micro_batches
        self.memory = memory

    def choose(self, num_seqs: int, tokens: int) -> Choice:
        """For a decode step of so many sequences with so many tokens together."""
        size = num_seqs if self.memory is None else self.memory.size_for(num_seqs)
        return Choice(self.last if size >= self.fewest else SEQUENTIAL_NUMBER, size)

    def observe(self, prediction: Any, seconds: float) -> None:
        """Takes the time of a step, with the `prediction` of its choice."""

    def capture(self, runner: StepRunner, *, show_progress: bool) -> None:
        """Captures the graphs that will be needed."""
        sizes = [] if self.memory is None else self.memory.sizes
        runner.capture([self.choose(size, 0) for size in sizes], show_progress=show_progress)


@dataclass(frozen=True)
class PreparedStep:
    """A step that is ready to run."""

    layout: StepLayout
    flat: torch.Tensor  # its inputs, int32 [layout.size]
    draws: Draws = NO_DRAWS  # what is made of its logits
    prediction: Any = None  # of its time, which is told to the chooser
    # Recorded before and after it; None: nobody wants to know its time.
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None


class StepRunner:
    """Runs the steps of a `ModelRunner`."""

    def __init__(
        self,
        config: Config,  # pipeline_enable_profiling is looked up at every step
        pipelines: Pipelines,  # its partitions are closed with the runner, after the graphs
        last_tokens: torch.Tensor,  # of each running request, on the device
        memory: GraphMemory | None,  # for CUDA graphs; None: run eagerly
        inputs: StepInputs,  # lays steps out and fills them
        send: Callable[[PreparedStep], None],  # to the other ranks, which then run it, too
    ) -> None:
        self.config, self.memory, self.inputs, self.send = config, memory, inputs, send
        self.schedulers, self.statistics = pipelines.schedulers, pipelines.statistics
        self.partitions = pipelines.partitions
        self.chooser = FixedChooser(self.schedulers, memory)
        self.last_tokens, self.device = last_tokens, last_tokens.device
        # Of decode, by plan, size, and whether it is timed.
        self.layouts: dict[tuple[int, int, bool], StepLayout] = {}
        self.graphs: dict[StepLayout, tuple[Any, StageTimer | None]] = {}
        self.timer: StageTimer | None = None  # of the last step

    def prepare(self, step: Step) -> PreparedStep:
        """Chooses how a step will run, and fills its inputs."""
        if not step.is_decode:
            return self.prepare_prompts(step.chunks)
        lengths = [chunk.end for chunk in step.chunks]
        choice = self.chooser.choose(len(lengths), sum(lengths))
        profiled = self.config.pipeline_enable_profiling
        return self.prepare_decode(choice, step.chunks, lengths, timed=profiled)

    def prepare_decode(
        self,
        choice: Choice,
        chunks: Sequence[Chunk],
        lengths: Sequence[int],
        *,
        timed: bool = False,
    ) -> PreparedStep:
        """A step of chunks of one token, which all are sampled, with padding.

        `timed`: times each `Work`, which takes time itself.
        """
        layout = self.layout(choice, timed)
        parts = balance(lengths, layout)
        events = None
        if choice.prediction is not None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            events = begin, end
        flat = self._fill(layout, chunks, parts)
        return PreparedStep(layout, flat, prediction=choice.prediction, events=events)

    def prepare_prompts(self, chunks: Sequence[Chunk]) -> PreparedStep:
        """A step of any chunks, as one micro-batch."""
        part = decode_first(chunks)
        layout = self.inputs.mixed_layout(SEQUENTIAL_NUMBER, [[chunks[i] for i in part]])
        return PreparedStep(layout, self._fill(layout, chunks, [part]))

    def layout(self, choice: Choice, timed: bool) -> StepLayout:
        """Of a decode step."""
        plan, size, _ = choice
        key = plan, size, timed
        if key not in self.layouts:
            batches = self.schedulers[plan].plan.micro_batches
            self.layouts[key] = self.inputs.decode_layout(plan, size, batches, timed=timed)
        return self.layouts[key]

    def run(
        self,
        step: PreparedStep,
        logits: torch.Tensor | None = None,
        timer: StageTimer | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Issues a step, or replays its graph; the other ranks must do the same.

        A capture issues the step with `logits` to write and its own `timer`. Returns logits
        [num_samples, this rank's part of the vocabulary], and hidden states [tokens, hidden size]
        if the step is scored and no graph was replayed.
        """
        layout = step.layout
        if logits is None:
            if self.memory is not None and layout.is_decode:
                return self._replay(step), None
            timer = self.timer = StageTimer(self.device) if layout.timed else None
        if timer:
            timer.begin_step()
        scheduler = self.schedulers[layout.plan]
        inputs = step.flat.to(self.device, non_blocking=True)
        batches, rows = micro_batches(layout, inputs, self.last_tokens, scheduler.workspace)
        scheduler.issue(batches, timer)
        hidden = hidden_states(batches)
        logits = scheduler.model.compute_logits(hidden if rows is None else hidden[rows], logits)
        if timer:
            timer.end_step()
        return logits, hidden if len(step.draws.scoring) else None

    def run_padding(self, size: int) -> torch.Tensor:
        """Runs a decode step of `size` rows, all of them padding; returns its logits."""
        choice = self.chooser.choose(size, size)
        return self.run(self.prepare_decode(choice, [], []))[0]

    def finish(self, step: PreparedStep, num_seqs: int) -> None:
        """Counts a decode step, which must be complete, and hands on how long it took.

        A profiled step's time is not handed on, as profiling is a part of it.
        """
        pipelined = len(step.layout.micro_batches) > 1
        self.statistics.count_step(num_seqs, pipelined=pipelined)
        if self.timer is not None:
            self.statistics.add_times(*self.timer.read())
        elif step.events is not None:
            begin, end = step.events
            self.chooser.observe(step.prediction, begin.elapsed_time(end) * 1e-3)

    @torch.inference_mode()
    def capture(self, choices: Iterable[Choice], *, show_progress: bool) -> None:
        """Captures steps now, rather than when they are first needed."""
        # The largest first: the others then fit into the pool's memory.
        largest_first = sorted(choices, key=lambda choice: -choice.size)
        if largest_first:
            bar = tqdm(largest_first, desc="Capturing CUDA graphs", disable=not show_progress)
            for choice in bar:
                profiled = self.config.pipeline_enable_profiling
                if self.layout(choice, profiled) not in self.graphs:
                    step = self.prepare_decode(choice, [], [], timed=profiled)
                    self.send(step)
                    self.run(step)
            # The steps that were run before their captures leave memory in sizes of their own.
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Frees the graphs, then the partitions that they ran on; may be called twice."""
        for graph, _ in self.graphs.values():
            graph.reset()
        if self.memory is not None:
            self.memory.release(len(self.graphs))
        self.graphs = {}
        self.partitions.close()

    def _replay(self, step: PreparedStep) -> torch.Tensor:
        assert self.memory is not None
        graph, self.timer = self.graphs.get(step.layout) or self._capture(step.layout)
        if step.events is not None:
            step.events[0].record()
        self.memory.inputs[: step.layout.size].copy_(step.flat, non_blocking=True)
        graph.replay()
        if step.events is not None:
            step.events[1].record()
        return self.memory.logits[: step.layout.num_samples]

    @torch.inference_mode()
    def _capture(self, layout: StepLayout) -> tuple[Any, StageTimer | None]:
        """Makes the graph of a step, and its timer if it is timed.

        NOTE: it runs the step once, collectives included, so all ranks must capture the same.
        """
        assert self.memory is not None
        padding = self._fill(layout, [], [[] for _ in layout.micro_batches])
        inputs = self.memory.inputs[: layout.size]
        inputs.copy_(padding)
        step, logits = PreparedStep(layout, inputs), self.memory.logits[: layout.num_samples]
        self.run(step, logits)  # outside: compiles kernels, makes handles
        timer = StageTimer(self.device, in_graph=True) if layout.timed else None
        graph = torch.cuda.CUDAGraph()
        with self.memory.capturing(graph):
            self.run(step, logits, timer)
        self.graphs[layout] = graph, timer
        return graph, timer

    def _fill(
        self, layout: StepLayout, chunks: Sequence[Chunk], parts: Sequence[Any]
    ) -> torch.Tensor:
        pin = self.device.type == "cuda"
        flat = torch.empty(layout.size, dtype=torch.int32, device="cpu", pin_memory=pin)
        self.inputs.fill(layout, chunks, parts, flat.numpy())
        return flat
