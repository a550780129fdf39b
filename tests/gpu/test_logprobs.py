"""Log-probabilities on a real GPU: of rows of CUDA graphs, and of prompts in chunks."""

from typing import Any

import pytest
import torch

from tests.checkpoints import prompts
from tests.scores import check_process

SETUPS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "eager": {"enforce_eager": True},
    "streams": {"enable_pipeline": True, "pipeline_mode": "streams", "pipeline_strict": True},
    "two ranks": {"tensor_parallel_size": 2},
    "nccl": {"tensor_parallel_size": 2, "all_reduce": "nccl"},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_float32_scores_are_near_those_of_transformers(tmp_path, setup):
    ranks = SETUPS[setup].get("tensor_parallel_size", 1)
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} CUDA devices, and there are {torch.cuda.device_count()}")
    asked = [(None, None), (3, 2), (0, None), (None, 20), (20, 0), (1, 1), (5, 5), (None, 0)]
    options = {
        "device": "cuda", "dtype": "float32", "max_model_len": 128, "max_num_seqs": 8,
        "num_kvcache_blocks": 64, "max_num_batched_tokens": 50, **SETUPS[setup],
    }  # fmt: skip
    fields = {"max_tokens": 12, "ignore_eos": True}
    check_process(tmp_path, prompts(6, count=8), asked, options, tolerance=1e-3, **fields)
