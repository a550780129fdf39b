"""Tensor parallelism over NCCL, with and without CUDA graphs.

Every engine runs in a process of its own, so that one that hangs fails its own test and no other.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import scripts
from tests.checkpoints import Shape, prompts

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

# Greedy tokens, then the logits of a prefill and of decode steps that all follow the same tokens.
GENERATE = """
import json, sys
import torch
from nanovllm import LLM
from nanovllm.engine import model_runner

with open(sys.argv[1]) as file:
    task = json.load(file)
llm = LLM(device="cuda", max_model_len=128, max_num_seqs=8, num_kvcache_blocks=64,
          kvcache_block_size=16, **task["options"])
options = dict(temperature=0, max_tokens=12, ignore_eos=True, use_tqdm=False)
tokens = [output["token_ids"] for output in llm.generate(task["prompts"], **options)]

logits = []

def always_seven(found, batch):
    logits.append(found.float().cpu())
    return torch.full((len(found),), 7, device=found.device)

model_runner.sample = always_seven
llm.generate(task["prompts"], **options)
torch.save(torch.cat(logits), sys.argv[2])
print(json.dumps(tokens))
"""


def generate(
    directory: Path, model: Path, *, processes: int = 0, **options: object
) -> tuple[list[list[int]], torch.Tensor]:
    """Tokens and logits of an engine with these options."""
    script, task, logits = (directory / name for name in ("generate.py", "task.json", "logits.pt"))
    script.write_text(GENERATE)
    options["model"] = str(model)
    task.write_text(json.dumps({"prompts": prompts(7, count=6), "options": options}))
    result = scripts.run(script, task, logits, processes=processes, timeout=240)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), torch.load(logits, weights_only=True)


@EAGER
@pytest.mark.parametrize("shape", SHAPES, ids=["gqa", "one kv head", "mha"])
def test_float32_tokens_equal_those_of_one_rank(tmp_path, shape, eager):
    shape.write(tmp_path / "model")
    options = {"dtype": "float32", "enforce_eager": eager}
    one, _ = generate(tmp_path, tmp_path / "model", **options)
    two, _ = generate(tmp_path, tmp_path / "model", tensor_parallel_size=2, **options)
    assert two == one


@EAGER
def test_bfloat16_logits_are_as_good_as_those_of_one_rank(tmp_path, eager):
    model = tmp_path / "model"
    Shape(layers=3, heads=8, kv_heads=2, hidden=256, intermediate=512, seed=4).write(model)
    _, exact = generate(tmp_path, model, dtype="float32", enforce_eager=eager)

    def error(size: int) -> float:
        options = {"dtype": "bfloat16", "enforce_eager": eager, "tensor_parallel_size": size}
        _, logits = generate(tmp_path, model, **options)
        return float((logits - exact).norm() / exact.norm())

    assert error(2) < 1.5 * error(1) + 5e-3


def test_torchrun_gives_the_same_tokens(tmp_path):
    SHAPES[0].write(tmp_path / "model")
    options = {"dtype": "float32"}
    one, _ = generate(tmp_path, tmp_path / "model", **options)
    options["tensor_parallel_size"] = 2
    two, _ = generate(tmp_path, tmp_path / "model", processes=2, **options)
    assert two == one


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
    script = tmp_path / "engines.py"
    script.write_text(ENGINES)
    result = scripts.run(script, tmp_path / "model", timeout=240)
    assert result.returncode == 0, result.stderr
    runs = [line.split() for line in result.stdout.splitlines()]
    assert len(runs) == 2
    for pid, status in runs:
        assert not scripts.is_running(int(pid))
        assert status == "0", result.stderr  # it was not killed when patience ended


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
    script = tmp_path / "death.py"
    script.write_text(DEATH)
    interpreter = scripts.broken_interpreter(tmp_path, place, scripts.KILL, call)
    mode = "eager" if eager else "graphs"
    # Memory is measured only where the measuring rank dies, as others may use the device, too.
    blocks = -1 if place.endswith("_run_largest_step") else 64
    result = scripts.run(script, tmp_path / "model", interpreter, mode, blocks, timeout=90)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("rank 1 of 2 was killed by SIGKILL")


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
    script = tmp_path / "profiling.py"
    script.write_text(PROFILING)
    result = scripts.run(script, tmp_path / "model", timeout=240)
    assert result.returncode == 0, result.stderr
    plain, profiled, again = (line.split() for line in result.stdout.splitlines())
    assert plain[:-1] == profiled[:-1] == again[:-1]
    assert [plain[-1], profiled[-1], again[-1]] == ["0", "4", "4"]
