"""Skips the tests of this folder where there is no GPU or no Triton; texts to compare with."""

import pytest
import torch

from nanovllm import LLM
from nanovllm.tiny import PROMPTS
from tests.gpu.texts import texts


def pytest_pycollect_makemodule() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device", allow_module_level=True)
    pytest.importorskip("triton", reason="needs Triton")


@pytest.fixture(scope="session")
def cpu_texts() -> list[str]:
    """Of all standard prompts."""
    with LLM(device="cpu") as engine:
        return texts(engine, len(PROMPTS))
