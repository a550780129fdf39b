"""Tensor parallelism on two GPUs, with and without CUDA graphs.

Engines run in processes of their own, so that one that hangs fails its own test and no other.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import engine_tasks, scripts
from tests.checkpoints import Shape, prompts
from tests.engine.cases import tokens

if torch.cuda.device_count() < 2:
    pytest.skip(
        f"needs 2 CUDA devices, and there are {torch.cuda.device_count()}", allow_module_level=True
    )

EAGER = pytest.mark.parametrize("eager", [False, True], ids=["graphs", "eager"])
SHAPES = [
    Shape(heads=8, kv_heads=2, seed=1),
    Shape(heads=8, kv_heads=1, tied=True, bias=True, seed=2),
    Shape(heads=4, kv_heads=4, head_dim=128, seed=3),
]

COMMON = {
    "device": "cuda", "max_model_len": 128, "max_num_seqs": 8, "num_kvcache_blocks": 64,
    "kvcache_block_size": 16,
}  # fmt: skip
SAMPLING = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.8, "seed": 2, "top_k": 20},
    {"temperature": 0.8, "seed": 3, "top_p": 0.9},
    {"temperature": 1.5, "seed": 4, "top_k": 300, "top_p": 0.95},
    {"temperature": 0},
]


def task_of(directory: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A few requests, greedy and drawn, for an engine with these options."""
    options = {"model": str(directory / "model"), **COMMON, **options}
    sampling = [{"max_tokens": 12, "ignore_eos": True, **fields} for fields in SAMPLING]
    return {"options": options, "prompts": prompts(7, count=6), "sampling": sampling}


# Logits of a prefill and of decode steps that all follow the same tokens. Every rank runs it.
LOGITS = """
import json, sys
import torch
from nanovllm import LLM
from nanovllm.engine import draws

logits = []

def always_seven(found, batch, group, shard):
    logits.append(found.float().cpu())
    return torch.full((len(found),), 7, device=found.device)

draws.sample = always_seven
with open(sys.argv[1]) as file:
    task = json.load(file)
llm = LLM(**task["options"])
logits.clear()  # of the warm-up
llm.generate(task["prompts"], temperature=0, max_tokens=12, ignore_eos=True, use_tqdm=False)
torch.save(torch.cat(logits), sys.argv[2])
"""


def logits_of(directory: Path, size: int, **options: object) -> torch.Tensor:
    """Logits of an engine with these options; the first rank has the whole small vocabulary."""
    script, file, saved = (directory / name for name in ("script.py", "task.json", "saved.pt"))
    script.write_text(LOGITS)
    file.write_text(json.dumps(task_of(directory, {"tensor_parallel_size": size, **options})))
    scripts.output_of(script, file, saved, processes=size if size > 1 else 0, timeout=120)
    return torch.load(saved, weights_only=True)


PIPELINES = {
    "sequential": {},
    "nccl": {"all_reduce": "nccl"},
    "microbatch": {"enable_pipeline": True, "pipeline_mode": "microbatch"},
    "streams": {"enable_pipeline": True, "pipeline_mode": "streams"},
    "green": {"enable_pipeline": True, "pipeline_mode": "green", "pipeline_ffn_sm_count": 96,
              "pipeline_attention_sm_count": 36},
}  # fmt: skip


@EAGER
@pytest.mark.parametrize(
    ("shape", "pipelines"),
    [(SHAPES[0], list(PIPELINES)), (SHAPES[1], ["sequential", "green"]),
     (SHAPES[2], ["sequential", "green"])],
    ids=["gqa", "one kv head", "mha"],
)  # fmt: skip
def test_float32_tokens_equal_those_of_one_rank(tmp_path, shape, pipelines, eager):
    shape.write(tmp_path / "model")
    common = {"dtype": "float32", "enforce_eager": eager}
    engines = [common]
    for pipeline in pipelines:
        options = PIPELINES[pipeline]
        strict = {"pipeline_strict": True} if options.get("enable_pipeline") else {}
        engines.append({**common, "tensor_parallel_size": 2, **options, **strict})
    tasks = [task_of(tmp_path, options) for options in engines]
    one, *others = engine_tasks.run_elsewhere(tmp_path, tasks)
    for pipeline, other in zip(pipelines, others, strict=True):
        assert tokens(other["outputs"]) == tokens(one["outputs"]), pipeline
        assert other["shares_memory"] == (pipeline != "nccl")
        assert (other["pipelined"] > 0) == ("pipeline_mode" in PIPELINES[pipeline]), pipeline


@EAGER
def test_bfloat16_logits_are_as_good_as_those_of_one_rank(tmp_path, eager):
    shape = Shape(layers=3, heads=8, kv_heads=2, hidden=256, intermediate=512, seed=4)
    shape.write(tmp_path / "model")
    exact = logits_of(tmp_path, 1, dtype="float32", enforce_eager=eager)

    def error(size: int) -> float:
        logits = logits_of(tmp_path, size, dtype="bfloat16", enforce_eager=eager)
        return float((logits - exact).norm() / exact.norm())

    assert error(2) < 1.5 * error(1) + 5e-3


def test_torchrun_gives_the_same_tokens(tmp_path):
    SHAPES[0].write(tmp_path / "model")
    alone, divided = (
        task_of(tmp_path, {"dtype": "float32", "tensor_parallel_size": size}) for size in (1, 2)
    )
    (one,) = engine_tasks.run_elsewhere(tmp_path, [alone])
    (two,) = engine_tasks.run_elsewhere(tmp_path, [divided], processes=2)
    assert two["shares_memory"]
    assert tokens(two["outputs"]) == tokens(one["outputs"])


ENGINES = """
import sys
from nanovllm import LLM

for _ in range(2):
    llm = LLM(sys.argv[1], device="cuda", tensor_parallel_size=2, max_model_len=128,
              max_num_seqs=4, num_kvcache_blocks=64, kvcache_block_size=16)
    llm.generate([[5, 6, 7]], max_tokens=4, use_tqdm=False)
    (worker,) = llm.model_runner.ranks.workers.processes
    llm.exit()
    print(worker.pid, worker.returncode, flush=True)
"""


def test_engines_one_after_the_other_end_cleanly(tmp_path):
    SHAPES[0].write(tmp_path / "model")
    first, second = scripts.output_of("-c", ENGINES, tmp_path / "model", timeout=240)
    for pid, status in (first.split(), second.split()):
        assert not scripts.is_running(int(pid))
        assert status == "0"  # it was not killed when patience ended


# Prints the error.
DEATH = """
import sys
from nanovllm import LLM
from nanovllm.engine.parallel.processes import RankDiedError

model, sys.executable, mode, blocks = sys.argv[1:]
try:
    llm = LLM(model, device="cuda", tensor_parallel_size=2, max_model_len=128, max_num_seqs=4,
              gpu_memory_utilization=0.2, kvcache_block_size=16, num_kvcache_blocks=int(blocks),
              enforce_eager=mode == "eager")
    llm.generate([[5, 6, 7]], max_tokens=4, ignore_eos=True, use_tqdm=False)
except RankDiedError as error:
    print(error, flush=True)
"""


@EAGER
@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("model_runner.load_model", 1),
        ("model_runner.ModelRunner._run_largest_step", 1),
        ("model_runner.PreparedStep", 1),  # where a worker has received a step
        ("model_runner.PreparedStep", 2),
    ],
    ids=["loading", "measuring memory", "prefill", "decode"],
)
def test_killed_worker_ends_rank_0(tmp_path, place, call, eager):
    """Also where rank 0 has an NCCL kernel running that waits for the worker.

    Where it does not end, `scripts.run` raises; NCCL's own patience is ten minutes.
    """
    SHAPES[0].write(tmp_path / "model")
    interpreter = scripts.broken_interpreter(tmp_path, place, scripts.KILL, call)
    mode = "eager" if eager else "graphs"
    # Memory is measured only where the measuring rank dies, as others may use the device, too.
    blocks = -1 if place.endswith("_run_largest_step") else 64
    arguments = tmp_path / "model", interpreter, mode, blocks
    said, *_ = scripts.output_of("-c", DEATH, *arguments, timeout=90)
    assert said.startswith("rank 1 of 2 was killed by SIGKILL")


PROFILING = """
import sys
from nanovllm import Config, LLM

config = Config(sys.argv[1], device="cuda", tensor_parallel_size=2, dtype="float32",
                enable_pipeline=True, max_model_len=128, max_num_seqs=4, num_kvcache_blocks=64,
                kvcache_block_size=16)
with LLM(config) as llm:
    for profiling in (False, True, False):
        config.pipeline_enable_profiling = profiling
        (output,) = llm.generate([[5, 6, 7]], temperature=0, max_tokens=5, ignore_eos=True,
                                 use_tqdm=False)
        steps = llm.model_runner.get_pipeline_statistics()["profiled_steps"]
        print(*output["token_ids"], steps, flush=True)
"""


def test_profiling_can_be_switched_with_graphs_captured(tmp_path):
    """A timed step has a graph of its own, and every rank has to capture it at the same step."""
    SHAPES[0].write(tmp_path / "model")
    lines = scripts.output_of("-c", PROFILING, tmp_path / "model", timeout=240)
    plain, profiled, again = map(str.split, lines)
    assert plain[:-1] == profiled[:-1] == again[:-1]
    assert [plain[-1], profiled[-1], again[-1]] == ["0", "4", "4"]
