"""Tensor parallelism on the CPU: the same tokens on any number of ranks, and no rank's death hangs.

Starting processes takes most of the time, so many configurations share one torchrun job.
"""

import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nanovllm import LLM
from nanovllm.engine.parallel.processes import RankDiedError
from nanovllm.engine.parallel.ranks import Ranks
from nanovllm.engine.pipeline_modes import PipelineUnavailable
from tests import engine_tasks, scripts
from tests.checkpoints import TABLE, OddVocabShape, Shape, prompts
from tests.close_draws import counting_close_draws
from tests.engine.cases import PIPELINED, tokens

SECONDS = 60.0  # for what takes one or two, on a busy machine
NO_HANG = pytest.mark.timeout(240)  # collectives themselves have half an hour

OPTIONS = [
    {"kvcache_block_size": 16},
    {"kvcache_block_size": 16, **PIPELINED},
    {"kvcache_block_size": 16, "max_num_batched_tokens": 7},
    {"kvcache_block_size": 16, "num_kvcache_blocks": 5},
    {"num_kvcache_blocks": 5, "kvcache_block_size": 16, "max_num_batched_tokens": 13, **PIPELINED},
    {"kvcache_block_size": 256, "max_num_seqs": 2},
]


def task_of(directory: Path, shape: Shape, options: dict, ranks: int) -> dict[str, Any]:
    """Requests of all kinds for a model of that shape."""
    model = directory / f"model-{shape.seed}"
    shape.write(model)
    vocab, seed = shape.config().vocab_size, shape.seed
    given = [[token % vocab for token in prompt] for prompt in prompts(seed, 5, longest=40)]
    drawn = {"temperature": 0.8, "seed": seed}
    limits = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": vocab // 2, "top_p": 0.97}]
    limits[1] |= {"presence_penalty": 1, "frequency_penalty": -1, "min_tokens": 1}
    limits[2] |= {"min_p": 0.001, "logit_bias": {token: 3 for token in range(0, vocab, 700)}}
    greedy = {"temperature": 0.0, "repetition_penalty": 1.3}
    sampling = [greedy] + [{**drawn, **limit} for limit in limits]
    for fields in sampling:  # some finish while others run
        fields["max_tokens"] = 24 if "num_kvcache_blocks" in options else random.randint(1, 24)
    options = {"model": str(model), "device": "cpu", "max_model_len": 64, **options}
    options["tensor_parallel_size"] = ranks
    return {"prompts": given, "sampling": sampling, "options": options}


def tokens_and_preemptions(result: dict[str, Any]) -> tuple[list[list[int]], int]:
    return tokens(result["outputs"]), result["preemptions"]


def on_one_rank(task: dict[str, Any]) -> dict[str, Any]:
    return engine_tasks.run(**{**task, "options": task["options"] | {"tensor_parallel_size": 1}})


def drawn_task(
    directory: Path, shape: Shape | None, options: dict, ranks: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A task and its result on one rank; None: of a random model, in which no draw is close."""
    if shape is not None:
        task = task_of(directory, shape, options, ranks)
        return task, on_one_rank(task)
    while True:
        shape = Shape.random(random.randrange(10**6))
        if shape.heads % ranks:
            continue
        task = task_of(directory, shape, options, ranks)
        with counting_close_draws() as close:
            result = on_one_rank(task)
        if not any(close):
            return task, result


def shapes_for_two() -> list[Shape | None]:
    odd = [OddVocabShape(tied=True, seed=50), OddVocabShape(bias=True, seed=51)]
    odd += [OddVocabShape(model_type=kind, seed=n) for n, kind in enumerate(TABLE, 52)]
    return [*odd, *[None] * 5]


def shapes_for_four() -> list[Shape | None]:
    """More ranks than KV heads."""
    return [
        OddVocabShape(layers=1, heads=8, kv_heads=1, bias=True, seed=60),
        OddVocabShape(layers=1, heads=8, kv_heads=2, tied=True, seed=61),
        OddVocabShape(layers=1, heads=4, kv_heads=4, model_type="llama", seed=62),
        OddVocabShape(layers=1, heads=8, kv_heads=2, model_type="qwen2", seed=63),
    ]


@pytest.mark.parametrize(
    ("size", "shapes"), [(2, shapes_for_two), (4, shapes_for_four)], ids=["two", "four"]
)
def test_ranks_agree_with_one_rank_under_torchrun(tmp_path, size, shapes):
    tasks, alone = [], []
    for shape, options in zip(shapes(), cycle(OPTIONS), strict=False):
        task, result = drawn_task(tmp_path, shape, options, size)
        tasks.append(task)
        alone.append(result)
    results = engine_tasks.run_elsewhere(tmp_path, tasks, processes=size)
    assert [*map(tokens_and_preemptions, results)] == [*map(tokens_and_preemptions, alone)]
    if any("num_kvcache_blocks" in task["options"] for task in tasks):
        assert sum(result["preemptions"] for result in results) > 0


PLAIN = """
import sys
from pathlib import Path
from nanovllm import LLM

sys.path.append(Path("imports pass over what is no text"))

def engine():
    llm = LLM(sys.argv[1], device="cpu", tensor_parallel_size=2, max_model_len=64)
    tokens = llm.generate([[5, 6, 7]], temperature=0, max_tokens=4, use_tqdm=False)[0]["token_ids"]
    workers = llm.model_runner.ranks.workers.processes
    print(*tokens, workers[0].pid)
    return llm, workers[0]

llm, worker = engine()
del llm
print("ended:", worker.returncode)
llm, worker = engine()
"""


def test_plain_script_ends_its_workers_however_it_drops_the_engine(tmp_path):
    """Engines one after the other: one garbage-collected, one left to the interpreter's exit."""
    Shape().write(tmp_path)
    result = scripts.run("-c", PLAIN, tmp_path)
    assert result.returncode == 0, result.stderr
    with LLM(str(tmp_path), device="cpu", max_model_len=64) as llm:
        outputs = llm.generate([[5, 6, 7]], temperature=0, max_tokens=4, use_tqdm=False)
    expected = [str(token) for token in outputs[0]["token_ids"]]
    first, ended, second = (line.split() for line in result.stdout.splitlines())
    assert [first[:-1], second[:-1]] == [expected, expected]
    assert ended == ["ended:", "0"]
    assert not any(scripts.is_running(int(run[-1])) for run in (first, second))
    noise = [line for line in result.stderr.splitlines() if "Loading weights" not in line]
    assert not any(noise), result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    directory = tmp_path_factory.mktemp("model")
    Shape().write(directory)
    return str(directory)


def make_engine(model: str, size: int = 2) -> LLM:
    return LLM(model, device="cpu", max_model_len=64, tensor_parallel_size=size)


def generate(engine: LLM) -> None:
    engine.generate([[5, 6, 7]] * 3, max_tokens=20, ignore_eos=True, use_tqdm=False)


@NO_HANG
@pytest.mark.parametrize(
    ("place", "death", "message"),
    [
        ("process_groups.ProcessGroups.meet", scripts.KILL, "was killed by SIGKILL"),
        ("model_runner.load_model", scripts.KILL, "was killed by SIGKILL"),
        ("model_runner.PreparedStep", scripts.KILL, "was killed by SIGKILL"),
        ("model_runner.PreparedStep", scripts.RAISE, "ended with exit status 1; its own messa"),
    ],
    ids=["killed joining", "killed loading", "killed in step", "error in step"],
)
def test_worker_dies(model, tmp_path, monkeypatch, capfd, place, death, message):
    """The engines of later tests also show that what this one leaves disturbs nobody."""
    interpreter = scripts.broken_interpreter(tmp_path, place, death)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(RankDiedError, match=f"rank 1 of 2 {message}"):
        generate(make_engine(model))
    assert ("ValueError: broken on purpose" in capfd.readouterr().err) == (death == scripts.RAISE)


@NO_HANG
def test_worker_dies_before_it_joins(model, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RankDiedError, match="rank 1 of 2 ended with exit status 1"):
        make_engine(model)


@NO_HANG
def test_an_interrupt_while_the_ranks_meet_leaves_nothing(model, monkeypatch):
    wait, threads = Ranks._wait_until, threading.active_count()

    def interrupt(ranks, done, what, seconds):
        if what == "meet":
            raise KeyboardInterrupt
        wait(ranks, done, what, seconds)

    monkeypatch.setattr(Ranks, "_wait_until", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_engine(model)
    assert not dist.is_initialized()
    assert scripts.wait_for(lambda: threading.active_count() <= threads, SECONDS) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@NO_HANG
def test_only_this_machine_can_reach_the_ranks_and_exit_ends_them(model):
    before = scripts.listening_sockets(os.getpid())
    with make_engine(model) as engine:
        during = scripts.listening_sockets(os.getpid())
        (worker,) = engine.model_runner.ranks.workers.processes
        engine.exit()
        engine.exit()
        assert worker.returncode == 0
    opened = {place.split(":")[0] for name, place in during.items() if name not in before}
    assert opened == {socket.inet_aton("127.0.0.1")[::-1].hex().upper()}


def test_a_second_engine_of_several_ranks_is_refused_while_the_first_is_open(model):
    with make_engine(model) as engine:
        with pytest.raises(ValueError, match=r"torch\.distributed initialised"):
            make_engine(model)
        generate(engine)
    with make_engine(model) as engine:
        generate(engine)


def test_what_all_ranks_refuse_is_told_as_one_rank_tells_it(model):
    """Though the other ranks end with the same error, it is no death."""
    options = {"device": "cpu", "pipeline_mode": "green", "pipeline_strict": True}
    with pytest.raises(PipelineUnavailable, match="needs a CUDA GPU"):
        LLM(model, enable_pipeline=True, tensor_parallel_size=2, **options)


@NO_HANG
def test_a_silent_worker_is_an_error_in_time(model):
    engine = LLM(model, device="cpu", max_model_len=64, tensor_parallel_size=2, step_timeout=50)
    generate(engine)
    ranks = engine.model_runner.ranks
    assert ranks.step_timeout == 50
    ranks.step_timeout = 0.5  # only now: a busy machine may keep a sound worker waiting for that
    (worker,) = ranks.workers.processes
    worker.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(RankDiedError, match=r"no progress for step_timeout=0\.5 s"):
        generate(engine)
    assert time.monotonic() - begin < SECONDS
    assert worker.returncode == -signal.SIGKILL


@NO_HANG
def test_worker_killed_between_steps(model):
    with make_engine(model, size=2) as engine:
        generate(engine)
        (worker,) = engine.model_runner.ranks.workers.processes
        worker.kill()
        worker.wait()
        with pytest.raises(RankDiedError, match="rank 1 of 2 was killed by SIGKILL"):
            generate(engine)
        with pytest.raises(RuntimeError, match="this engine has exited"):
            generate(engine)


@NO_HANG
def test_a_lost_device_leaves_no_worker_behind(model, monkeypatch):
    engine = make_engine(model, size=2)
    runner = engine.model_runner
    (worker,) = runner.ranks.workers.processes

    def lost() -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(runner, "synchronize", lost)
    with pytest.raises(RuntimeError, match="device is lost"):
        engine.exit()
    assert worker.poll() is not None
    assert not Path(runner.ranks.meeting).exists()


@NO_HANG
def test_interrupted_step_ends_the_engine(model, monkeypatch):
    """The worker is then in the middle of a step that rank 0 will never join."""
    engine = make_engine(model)
    (worker,) = engine.model_runner.ranks.workers.processes

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.model_runner.step_runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(engine)
    assert worker.returncode == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="this engine has exited"):
        generate(engine)


ENDLESS = """
import sys
from nanovllm import LLM

llm = LLM(sys.argv[1], device="cpu", tensor_parallel_size=2, max_model_len=64)
print(*(worker.pid for worker in llm.model_runner.ranks.workers.processes), flush=True)
while True:
    llm.generate([[5, 6, 7]], max_tokens=20, use_tqdm=False)
"""


def test_workers_end_with_rank_0(model):
    rank_0 = scripts.start("-c", ENDLESS, model)
    assert rank_0.stdout is not None
    workers = [int(pid) for pid in rank_0.stdout.readline().split()]
    assert len(workers) == 1
    assert all(map(scripts.is_running, workers))
    time.sleep(0.2)
    rank_0.kill()
    rank_0.communicate()
    assert scripts.seconds_to_end(workers, SECONDS) is not None


CRASH = """
import os, sys
from nanovllm import LLM
from nanovllm.engine.step_runner import StepRunner

if os.environ["RANK"] == "1":
    def run(self, *args, **options):
        raise ValueError("broken on purpose")
    StepRunner.run = run
llm = LLM(sys.argv[1], device="cpu", tensor_parallel_size=2, max_model_len=64)
print("serving", flush=True)
llm.generate([[5, 6, 7]], max_tokens=20, use_tqdm=False)
print("generated", flush=True)
"""


def test_crash_of_a_rank_ends_torchrun(model, tmp_path):
    script = tmp_path / "crash.py"
    script.write_text(CRASH)
    job = scripts.start(script, model, processes=2)
    assert job.stdout is not None
    assert job.stdout.readline() == "serving\n"
    out, err = job.communicate(timeout=200)
    assert job.returncode != 0
    assert out == ""
    assert "ValueError: broken on purpose" in err


SECOND_ENGINE = """
import sys
from nanovllm import LLM
from nanovllm.engine.parallel import ranks
for ranks.LOAD_SECONDS in (60.0, 2.0):
    try:
        LLM(sys.argv[1], device="cpu", tensor_parallel_size=2, max_model_len=64).exit()
    except ranks.RankDiedError as error:
        print(error, flush=True)
"""


def test_ranks_of_torchrun_do_not_wait_without_end_for_others_that_have_ended(model, tmp_path):
    """They serve one engine; a second one would wait for them."""
    script = tmp_path / "second.py"
    script.write_text(SECOND_ENGINE)
    lines = scripts.output_of(script, model, processes=2)
    assert lines == ["the ranks did not meet within 2 s"]
