"""Shared set-up: without a GPU, Triton kernels run in Triton's interpreter."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    # Before any kernel module is imported: Triton reads it when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# No time limit for an example: shared machines stall now and then.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Small models on several threads spend their time on waiting for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every file that is read, the index aside."""
    from tests.broken_checkpoints import write_sound  # after the setting above

    directory = tmp_path_factory.mktemp("sound")
    write_sound(directory)
    return directory


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "model"))
