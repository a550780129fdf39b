"""For every test of this folder: a printed seed, no memory that is zero by chance, and Triton."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import new_seed


def pytest_pycollect_makemodule() -> None:
    """Skip the folder where there is no Triton: its modules import kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True)
def seed() -> int:
    return new_seed()


@pytest.fixture
def poison(monkeypatch):
    """Let torch.empty and torch.empty_like return NaN, or -1 for integers, not chance zeros."""

    def filled(function):
        def call(*args, **kwargs):
            x = function(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else -1)

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
