"""Which device an option means."""

import pytest
import torch

from nanovllm.utils.device import resolve_device, sm_count


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


@pytest.mark.usefixtures("two_gpus")
def test_cuda_is_this_ranks_own_device_and_auto_takes_it(monkeypatch):
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cuda:0") == resolve_device("cuda:00") == torch.device("cuda", 0)
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("number", [2, 128, 256, 257, 10**30])  # torch takes them modulo 256
def test_a_number_that_no_device_has_is_refused(number):
    with pytest.raises(ValueError, match=rf"^device='cuda:{number}' is not allowed.*from 0 to 1"):
        resolve_device(f"cuda:{number}")


@pytest.mark.usefixtures("two_gpus")
def test_so_is_a_local_rank_without_a_device(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"^device='cuda' is not allowed.*from 0 to 1, and 2 is"):
        resolve_device("cuda")


def test_where_there_is_no_cuda_auto_is_the_cpu_and_all_else_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    for device in ("cuda", "cuda:3"):
        with pytest.raises(ValueError, match=f"^device='{device}' .*: this machine has no usable"):
            resolve_device(device)
    assert sm_count(torch.device("cpu")) == 0
