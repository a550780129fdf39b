"""For every test of this folder: a printed seed, no memory that is zero by chance, and Triton."""

import importlib
from collections.abc import Callable

import pytest
import torch

from tests.kernels.cases import new_seed


def pytest_pycollect_makemodule() -> None:
    """Skip the folder where there is no Triton: its modules import kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(autouse=True, scope="session")
def _patch_once() -> None:
    """Halves the time of Triton's interpreter, which searches its modules in every nested call.

    It does so to replace their functions, which the call around it has done. Should another version
    of Triton have other names inside, tests are slower, and that is all.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    patch, scope = (getattr(interpreter, n, None) for n in ("_patch_lang", "_LangPatchScope"))
    if patch is None or scope is None:
        return
    language = interpreter.tl

    def patch_once(fn: Callable[..., object]) -> object:
        used = [
            m for m in (language, language.core) if any(v is m for v in fn.__globals__.values())
        ]
        patched = used and not any(language.core.is_builtin(m.load) for m in used)
        return scope() if patched else patch(fn)

    interpreter._patch_lang = patch_once


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
