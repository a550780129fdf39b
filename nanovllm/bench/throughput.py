"""Whole runs of requests, prefill and decode together: output tokens over the run's time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from nanovllm.bench import report
from nanovllm.bench.arms import choose_split, pipeline_options
from nanovllm.bench.engines import start_engine
from nanovllm.bench.report import Record
from nanovllm.bench.requests import MAX_MODEL_LEN, MAX_NUM_SEQS, Requests, draw_requests
from nanovllm.bench.step_log import StepLog
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.device import sm_count

WARM_UP = [*range(100)]


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Runs a set of requests once, after a short one to warm up.

    Workload "nano" is the set "W", or the first of it, on an engine with nano-vllm's defaults.
    """
    name, count = args.requests, args.num_requests
    options: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN}
    if args.workload == "nano":
        name, count = "W", args.requests
    else:
        options["max_num_seqs"] = args.max_num_seqs or MAX_NUM_SEQS.get(name, 1024)
    split = choose_split(sm_count(args.device), args.attention_sms, args.ffn_sms)
    options |= pipeline_options(args.mode, split)
    with start_engine(args, **options) as (engine, about):
        vocab_size = engine.model_runner.model_config.vocab_size
        requests = draw_requests(name, vocab_size, count)
        record = report.describe_machine(args.device, args.workload) | about
        yield record | {"request_set": name} | run_requests(engine, requests)


def run_requests(engine: LLMEngine, requests: Requests) -> Record:
    """The JSON fields of a run."""
    prompts, outputs = requests
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output) for output in outputs
    ]
    engine.generate([WARM_UP], temperature=0.6, ignore_eos=True, use_tqdm=False)
    statistics = engine.model_runner.step_runner.statistics
    preemptions, steps = engine.scheduler.num_preemptions, dict(statistics.steps)
    with StepLog(engine.model_runner) as log:
        start = time.perf_counter()
        completions = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
    output_tokens = sum(len(completion["token_ids"]) for completion in completions)
    return {
        "requests": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "output_tokens": output_tokens,
        "seconds": seconds,
        "output_tokens_per_second": output_tokens / seconds,
        **log.totals(),
        "preemptions": engine.scheduler.num_preemptions - preemptions,
        "runs_as": statistics.mode,
        "lane_sms": dict(statistics.lane_sms),
        "steps_by_path": {path: n - steps[path] for path, n in statistics.steps.items()},
        "fallback_reason": statistics.fallback_reason,
    }


def describe(record: Record) -> str:
    """A run in a few lines."""
    steps = record["steps_by_path"]
    lines = [
        report.title(record),
        f"{record['requests']} requests of {record['request_set']}: {record['prompt_tokens']:,} "
        f"tokens in, {record['output_tokens']:,} out, in {record['seconds']:.2f} s, decode "
        f"{record['runs_as']} ({steps['pipelined']} of {sum(steps.values())} steps as a pipeline)",
        f"{record['output_tokens_per_second']:,.0f} output tokens per second",
        *(
            f"{kind}: {record[f'{kind}_tokens']:,} tokens in {record[f'{kind}_seconds']:.2f} s "
            f"of work, {record[f'{kind}_tokens'] / record[f'{kind}_seconds']:,.0f} a second"
            for kind in ("prefill", "decode")
            if record[f"{kind}_tokens"]
        ),
        f"recomputed: {record['recomputed_tokens']:,} tokens, {record['preemptions']} preemptions",
    ]
    if gaps := record["inter_token_ms"]:
        lines.append(
            f"between two tokens of a request: median {gaps['median']:.2f} ms, 99th percentile "
            f"{gaps['p99']:.2f} ms"
        )
    if record["gpu_idle_share"] is not None:
        lines.append(
            f"between decode steps the GPU is idle for {record['gpu_idle_share']:.2%} of the time "
            f"({record['gpu_idle_gaps']:,} gaps)"
        )
    if record["fallback_reason"] is not None:
        lines.append(f"The pipeline fell back: {record['fallback_reason']}")
    return "\n".join(lines)
