"""Pipelined engines give the sequential tokens; where there is no pipeline, the log says why."""

import logging
import random
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from green_ctx import DriverError, GreenContextError
from nanovllm import LLM
from nanovllm.engine.pipeline_modes import PipelineUnavailable
from nanovllm.engine.plan import GREEN, LANES3, SEQUENTIAL
from nanovllm.engine.scheduler import Chunk, Step
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_inputs import decode_first
from nanovllm.engine.step_runner import FixedChooser, PreparedStep
from nanovllm.sampling_params import SamplingParams
from nanovllm.tiny import PROMPTS
from tests.checkpoints import VOCAB, Shape
from tests.decode_cases import relative_error
from tests.engine.cases import PIPELINED, drain, tokens
from tests.fake_driver import FakeDriver, Result, build, install
from tests.seed_spec import FAILED, FALLING_BACK

MAX_TOKENS = 20
NO_GREEN = "[GreenContextManager] Failed to initialize Green Context: "


# What is pipelined


def test_steps_of_two_sequences_or_more_are_pipelined(tmp_path):
    Shape().write(tmp_path)
    with LLM(str(tmp_path), device="cpu", kvcache_block_size=16, **PIPELINED) as llm:
        for max_tokens in (8, 4):
            llm.add_request([5, 6, 7], temperature=0, max_tokens=max_tokens, ignore_eos=True)
        drain(llm)
        stats = llm.model_runner.get_pipeline_statistics()
    # Each prefill draws one token of a request, decode the others: 3 steps for two, 4 for one.
    assert stats["tokens"] == {"pipelined": 6, "sequential": 4}
    assert stats["steps"] == {"pipelined": 3, "sequential": 4}
    assert stats["mode"] == "microbatch"
    assert stats["fallback_reason"] is None


# Where there is no pipeline


@pytest.fixture(scope="module")
def plain_tokens() -> list[list[int]]:
    with LLM(device="cpu") as llm:
        outputs = llm.generate(
            list(PROMPTS[:4]), temperature=0, max_tokens=MAX_TOKENS, use_tqdm=False
        )
    return tokens(outputs)


@pytest.mark.parametrize("mode", ["auto", "green", "streams"])
def test_an_engine_on_the_cpu_falls_back_and_says_so(mode, caplog, capsys, plain_tokens):
    caplog.set_level(logging.WARNING)
    with LLM(
        device="cpu", enable_pipeline=True, pipeline_mode=mode, pipeline_enable_profiling=True
    ) as llm:
        outputs = llm.generate(
            list(PROMPTS[:4]), temperature=0, max_tokens=MAX_TOKENS, use_tqdm=False
        )
        stats = llm.model_runner.get_pipeline_statistics()
        llm.model_runner.print_pipeline_statistics()
    reason = f"pipeline_mode={mode!r} needs a CUDA GPU, not cpu"
    assert caplog.messages == [FAILED + reason, FALLING_BACK]
    assert tokens(outputs) == plain_tokens
    assert stats["mode"] == "sequential"
    assert stats["fallback_reason"] == reason
    assert stats["steps"]["pipelined"] == 0
    # Both stages are timed all the same, one after the other.
    assert stats["profiled_steps"] == stats["steps"]["sequential"] > 0
    assert min(stats["avg_attention_ms"], stats["avg_ffn_ms"]) > 0
    assert stats["avg_total_ms"] >= stats["avg_attention_ms"] + stats["avg_ffn_ms"]
    assert stats["overlap_share"] == 0.0
    assert f"  Fallback reason: {reason}\n" in capsys.readouterr().out
    caplog.clear()
    with pytest.raises(PipelineUnavailable, match=f"^{reason}$"):
        LLM(device="cpu", enable_pipeline=True, pipeline_mode=mode, pipeline_strict=True)
    assert FALLING_BACK not in caplog.messages


def no_library(flags: int) -> tuple[Any, ...]:
    raise RuntimeError("libcuda.so.1 was not found")


# What stands in for the driver's bindings (None: they are not installed), and the true reason.
DRIVERS = {
    "no cuda-python": (None, "cuda-bindings cannot be imported: "),
    "no driver library": (
        SimpleNamespace(cuInit=no_library),
        "no CUDA driver: libcuda.so.1 was not found",
    ),
    "an old driver": (
        FakeDriver(version=12020),
        "driver and cuda-bindings must be for CUDA 12.4 or newer; the driver is for 12.2",
    ),
    "a device that cannot be split": (
        FakeDriver(most_groups=lambda size: 0),
        "device 0 with 132 SMs cannot be split",
    ),
    "error 914": (
        FakeDriver(errors={"cuGreenCtxCreate": 4 * [Result.CUDA_ERROR_INVALID_RESOURCE_TYPE]}),
        "CUDA error code=914 (CUDA_ERROR_INVALID_RESOURCE_TYPE) in cuGreenCtxCreate",
    ),
}


@pytest.mark.parametrize("cause", DRIVERS)
def test_the_log_says_why_there_are_no_green_contexts(cause, monkeypatch, caplog):
    bindings, reason = DRIVERS[cause]
    install(monkeypatch, bindings)
    for mode in ("auto", "green"):
        caplog.clear()
        built = build(pipeline_mode=mode)
        assert [scheduler.plan for scheduler in built.schedulers] == [SEQUENTIAL]
        full = built.statistics.fallback_reason
        assert full.startswith(reason)
        assert built.statistics.mode == "sequential"
        assert caplog.messages == [NO_GREEN + full, FAILED + full, FALLING_BACK]
        caplog.clear()
        with pytest.raises(GreenContextError) as caught:
            build(pipeline_mode=mode, pipeline_strict=True)
        assert caplog.messages == [NO_GREEN + str(caught.value)] == [NO_GREEN + full]


@pytest.fixture
def fake_gpu(monkeypatch) -> FakeDriver:
    """A driver that grants partitions, and torch streams that are only their handles."""
    bindings = FakeDriver()
    install(monkeypatch, bindings)
    return bindings


def test_counts_that_do_not_fit_are_named_with_the_device(fake_gpu, caplog):
    counts = {"pipeline_attention_sm_count": 100, "pipeline_ffn_sm_count": 40}
    reason = build(**counts).statistics.fallback_reason
    assert reason.startswith("pipeline_attention_sm_count=100 and pipeline_ffn_sm_count=40 are not")
    assert reason.endswith("they need 140 SMs, and the device has 132")
    assert caplog.messages == [FAILED + reason, FALLING_BACK]
    with pytest.raises(ValueError, match=r"they need 140 SMs, and the device has 132$"):
        build(**counts, pipeline_strict=True)
    assert fake_gpu.contexts == {}


@pytest.mark.parametrize("options", [{"enable_pipeline": False}, {"pipeline_mode": "sequential"}])
def test_a_pipeline_that_is_not_asked_for_is_not_built(options, fake_gpu, caplog):
    built = build(**options, pipeline_strict=True)
    assert [scheduler.plan for scheduler in built.schedulers] == [SEQUENTIAL]
    assert built.statistics.fallback_reason is None
    assert (fake_gpu.calls, caplog.messages) == ([], [])


def test_auto_is_green_where_green_contexts_can_be_had(fake_gpu, caplog):
    caplog.set_level(logging.INFO)
    built = build(pipeline_attention_sm_count=30, pipeline_ffn_sm_count=60)
    chooser = FixedChooser(built.schedulers, None)
    assert [chooser.choose(n, 0).plan for n in (1, 2, 9)] == [0, 1, 1]
    stats = built.statistics.as_dict()
    assert (stats["mode"], stats["fallback_reason"]) == ("green", None)
    assert (stats["attention_sms"], stats["ffn_sms"], stats["device_sms"]) == (32, 64, 132)
    assert caplog.messages == ["[ModelRunner] Pipeline: attention 32, FFN 64 of 132 SMs"]
    assert [scheduler.workspace for scheduler in built.schedulers] == ["for 132 SMs", "for 32 SMs"]
    assert "  Mode: green (attention 32, FFN 64 of 132 SMs)" in built.statistics.format()
    assert len(fake_gpu.contexts) == 2
    built.partitions.close()
    built.partitions.close()
    assert (fake_gpu.contexts, fake_gpu.streams) == ({}, {})


def test_a_third_lane_has_a_partition_of_its_own(fake_gpu):
    built = build(plan=LANES3.with_sms((36, 80, 16)), pipeline_strict=True)
    lanes = built.schedulers[1].lanes
    sms = [fake_gpu.sms_of(lane.stream) for lane in lanes.values()]
    assert list(lanes) == ["attention", "ffn", "qkv"]
    assert [lane.sms for lane in lanes.values()] == list(map(len, sms)) == [36, 80, 16]
    assert len(set().union(*sms)) == 132
    assert built.schedulers[1].workspace == "for 36 SMs"
    built.partitions.close()
    assert (fake_gpu.contexts, fake_gpu.streams) == ({}, {})
    with pytest.raises(PipelineUnavailable, match="16"):
        build(plan=LANES3.with_sms((36, 88, 8)), pipeline_strict=True)
    assert (fake_gpu.contexts, fake_gpu.streams) == ({}, {})


def test_auto_has_all_plans_that_the_device_makes(fake_gpu):
    more = [GREEN.with_sms(sms) for sms in ((36, 96), (10, 16), (90, 90), (44, 88))]
    built = build(more=more)
    names = [scheduler.plan.name for scheduler in built.schedulers]
    # 10+16 is granted as 16+16, which there is; 90+90 cannot be.
    assert names == ["sequential", "green 16+16", "green 36+96", "green 44+88"]
    built.partitions.close()
    assert (fake_gpu.contexts, fake_gpu.streams) == ({}, {})


@pytest.mark.parametrize("strict", [True, False])
def test_a_configured_split_that_does_not_fit_is_one_candidate_less_in_auto(strict, fake_gpu):
    too_many: Any = {
        "pipeline_attention_sm_count": 90, "pipeline_ffn_sm_count": 90, "pipeline_strict": strict
    }  # fmt: skip
    built = build(more=[GREEN.with_sms((36, 96))], **too_many)
    assert [scheduler.plan.name for scheduler in built.schedulers] == ["sequential", "green 36+96"]
    assert built.statistics.fallback_reason is None
    built.partitions.close()
    if strict:
        with pytest.raises((RuntimeError, ValueError), match="90"):
            build(**too_many)
    else:
        assert "90" in (build(**too_many).statistics.fallback_reason or "")
    assert (fake_gpu.contexts, fake_gpu.streams) == ({}, {})


@pytest.mark.parametrize("strict", [True, False])
def test_partitions_do_not_outlive_a_failure_after_them(strict, fake_gpu, monkeypatch):
    """Whatever goes wrong between the partitions and the finished pipeline."""

    def refuse(handle: int, device: torch.device) -> None:
        raise DriverError("cuStreamGetCtx", 914, "CUDA_ERROR_INVALID_RESOURCE_TYPE")

    monkeypatch.setattr(torch.cuda, "ExternalStream", refuse)
    if strict:
        with pytest.raises(DriverError, match="914"):
            build(pipeline_strict=True)
    else:
        assert "914" in build().statistics.fallback_reason
    assert (fake_gpu.contexts, fake_gpu.streams) == ({}, {})


# How it is called


def test_few_frames_lie_between_generate_and_the_kernel(monkeypatch):
    """In a pipelined step, both ends counted, and whatever torch puts between."""
    deepest: list[list[str]] = []
    with LLM(device="cpu", enable_pipeline=True, pipeline_mode="microbatch") as llm:
        decode = llm.model_runner.backend.decode

        def counted(*args: Any) -> torch.Tensor:
            names, frame = [], sys._getframe()
            while frame is not None and names[-1:] != ["generate"]:
                names.append(frame.f_code.co_name)
                frame = frame.f_back  # type: ignore[assignment]
            deepest.append(names)
            return decode(*args)

        monkeypatch.setattr(llm.model_runner.backend, "decode", counted)
        llm.generate(list(PROMPTS[:4]), max_tokens=4, ignore_eos=True, use_tqdm=False)
        assert llm.model_runner.get_pipeline_statistics()["steps"]["pipelined"] == 3
    assert all(names[-1] == "generate" for names in deepest)
    assert max(map(len, deepest)) <= 11, max(deepest, key=len)


# Rows of both kinds


@pytest.mark.parametrize("seed", range(8))
@torch.inference_mode()
def test_a_step_of_prompts_and_decode_rows_has_the_logits_of_separate_steps(tmp_path, seed):
    """Some prompts go on, some end, one begins; some of the last tokens only the device knows."""
    rng = random.Random(seed)
    Shape.random(seed).write(tmp_path)
    with LLM(str(tmp_path), device="cpu", kvcache_block_size=16, max_model_len=128) as llm:
        runner = llm.model_runner
        blocks = iter(range(1, runner.num_blocks))
        chunks, before = [], []
        for index in range(7):
            length = rng.randint(2, 60)
            end = rng.choice([length, rng.randint(1, length)])
            start = rng.choice([end - 1, rng.randint(0, end - 1)])
            tokens = [rng.randrange(2, VOCAB) for _ in range(length)]
            if end == length and rng.random() < 0.5:
                runner.last_tokens[index] = tokens.pop()
            table = [next(blocks) for _ in range(-(-length // 16))]
            seq = Sequence(index, tokens, SamplingParams(), frozenset(), 128, 0, block_table=table)
            seq.request_index = index
            chunks.append(Chunk(seq, start, end, needs_sample=rng.random() < 0.8))
            before += [Chunk(seq, 0, start, needs_sample=False)] if start else []
        kinds = {chunk.end - chunk.start > 1 for chunk in chunks}
        steps = runner.step_runner
        if before:
            steps.run(steps.prepare(Step(False, before)))
        together, _ = steps.run(steps.prepare(Step(False, chunks)))
        alone = [
            steps.run(steps.prepare(Step(chunk.end - chunk.start == 1, [chunk])))[0]
            for chunk in chunks
            if chunk.needs_sample
        ]
        assert kinds == {True, False}
        assert together.shape == (len(alone), VOCAB)
        assert relative_error(together, torch.cat(alone)) < 1e-5

        # The same rows as three micro-batches, on the stages of a pipeline.
        numbers = decode_first(chunks)
        parts = [numbers[i::3] for i in range(3)]
        layout = steps.inputs.mixed_layout(0, [[chunks[i] for i in part] for part in parts])
        flat = torch.empty(layout.size, dtype=torch.int32)
        steps.inputs.fill(layout, chunks, parts, flat.numpy())
        assert relative_error(steps.run(PreparedStep(layout, flat))[0], together) < 1e-5
