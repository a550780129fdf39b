"""Whole runs of requests, prefill and decode together: output tokens over the run's time."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

from nanovllm.bench import report
from nanovllm.bench.arms import choose_split, pipeline_options
from nanovllm.bench.ceilings import matmul_peak, prefill_flops
from nanovllm.bench.engines import start_engine
from nanovllm.bench.report import Record
from nanovllm.bench.requests import MAX_MODEL_LEN, MAX_NUM_SEQS, Requests, draw_requests, within
from nanovllm.bench.step_log import StepLog
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.device import sm_count

WARM_UP, WARM_UP_OUTPUT = [1] * 100, 64


def run(args: argparse.Namespace) -> Iterator[Record]:
    """Runs a set of requests once, after a short one to warm up.

    Workload "nano" is the set "W" on an engine with nano-vllm's defaults, and "prefill" the set of
    that name, whose rate stands beside that of a large matrix product.
    """
    split = choose_split(sm_count(args.device), args.attention_sms, args.ffn_sms)
    options = pipeline_options(args.mode, split) | {
        "max_num_seqs": args.max_num_seqs or MAX_NUM_SEQS.get(args.requests, 1024),
        "max_model_len": MAX_MODEL_LEN,
    }
    prompts, outputs = draw_requests(args.requests, args.num_requests)
    lengths = [len(prompt) + output for prompt, output in zip(prompts, outputs, strict=True)]
    longest = max(len(WARM_UP) + WARM_UP_OUTPUT, *lengths)
    with start_engine(args, longest=longest, **options) as (engine, about):
        runner = engine.model_runner
        config = runner.model_config
        requests = within(prompts, config.vocab_size), outputs
        record = report.describe_machine(args.device, args.workload) | about
        record |= {"request_set": args.requests} | run_requests(engine, requests)
        yield record
        if args.workload == "prefill" and args.device.type == "cuda":
            dtype = next(runner.model.parameters()).dtype
            peak = matmul_peak(runner.device, dtype) * args.tensor_parallel_size
            flops = prefill_flops(config, [len(prompt) for prompt in requests[0]])
            rate = flops / record["prefill_seconds"]
            yield record | {"flops_per_second": rate, "matmul_peak": peak}


def run_requests(engine: LLMEngine, requests: Requests) -> Record:
    """The JSON fields of a run."""
    prompts, outputs = requests
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output) for output in outputs
    ]
    warm_up = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=WARM_UP_OUTPUT)
    engine.generate([WARM_UP], warm_up, use_tqdm=False)
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
    ]
    for kind in ("prefill", "decode"):
        tokens, seconds = record[f"{kind}_tokens"], record[f"{kind}_seconds"]
        rate = tokens / (seconds or 1.0)
        lines.append(f"{kind}: {tokens:,} tokens in {seconds:.2f} s of work, {rate:,.0f} a second")
    lines.append(
        f"recomputed: {record['recomputed_tokens']:,} tokens, {record['preemptions']} preemptions"
    )
    if gaps := record["inter_token_ms"]:
        lines.append(
            f"between two tokens of a request: median {gaps['median']:.2f} ms, 99th percentile "
            f"{gaps['p99']:.2f} ms"
        )
    if peak := record.get("matmul_peak"):
        rate = record["flops_per_second"]
        lines.append(
            f"prefill: {rate / 1e12:.3g} TFLOP/s, {rate / peak:.1%} of a large matrix product "
            f"({peak / 1e12:.3g} TFLOP/s)"
        )
    if record["gpu_idle_share"] is not None:
        lines.append(
            f"between decode steps the GPU is idle for {record['gpu_idle_share']:.2%} of the time"
        )
    if record["fallback_reason"] is not None:
        lines.append(f"The pipeline fell back: {record['fallback_reason']}")
    return "\n".join(lines)
