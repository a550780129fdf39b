"""1,000 pipelined decode steps with changing batch sizes, for a memory checker to watch.

    compute-sanitizer --tool memcheck --report-api-errors no python tests/gpu/memcheck_steps.py

(Without the option it lists what the driver says of functions that it does not have.) With 2 as an
argument there are two ranks on two GPUs, which are alike, so that it is enough to watch rank 0:
`--target-processes application-only`. Steps are too short for NCCL to be needed: it has so many
kernels that the checker would take minutes to load them.

The model is small and the graphs are few, as the checker makes everything many times slower.
"""

import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanovllm import LLM
from nanovllm.bench.shapes import published_config

STEPS = 1000
SEATS = 8
VOCAB = 512
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "eos_token_id": 1,
}


def main() -> None:
    with TemporaryDirectory() as directory:
        config = published_config("0.6B", layers=2) | SMALL
        (Path(directory) / "config.json").write_text(json.dumps(config))
        with LLM(
            directory,
            device="cuda",
            load_format="dummy",
            max_num_seqs=SEATS,
            max_model_len=128,
            kvcache_block_size=16,
            num_kvcache_blocks=40,
            max_num_batched_tokens=1024,
            enable_pipeline=True,
            pipeline_mode="green",
            pipeline_strict=True,
            tensor_parallel_size=int(sys.argv[1]) if len(sys.argv) > 1 else 1,
            step_timeout=300,
        ) as engine:
            run_steps(engine)
    print(f"{STEPS} steps done")


def run_steps(engine: LLM) -> None:
    """Requests of all lengths come and go, so the batch grows and shrinks."""
    rng = random.Random(0)
    statistics = engine.model_runner.get_pipeline_statistics
    begin, shown = time.monotonic(), 0
    while (done := sum(statistics()["steps"].values())) < STEPS:  # type: ignore[attr-defined]
        if done >= shown:
            print(f"{done} steps after {time.monotonic() - begin:.0f} s", flush=True)
            shown = done + STEPS // 10
        for _ in range(rng.randint(1, SEATS)):
            prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 60))]
            engine.add_request(prompt, max_tokens=rng.randint(1, 60), ignore_eos=True)
        while not engine.is_finished():
            engine.step()


if __name__ == "__main__":
    main()
