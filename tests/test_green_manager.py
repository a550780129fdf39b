"""The partitions of lanes, on the CPU, against a fake driver; failures: test_driver_faults.py."""

import pytest
import torch

from nanovllm.engine.green_manager import GreenContextManager
from tests.fake_driver import FakeDriver, manager_with


@pytest.fixture(autouse=True)
def _handles_as_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: (handle, device))


@pytest.mark.parametrize(
    ("asked", "granted"),
    [((30, 90), (32, 96)), ((33, 96), (36, 96)), ((16, 116), (16, 116)), ((40, 92), (40, 92))],
)
def test_manager_grants(asked, granted):
    fake = FakeDriver()
    with manager_with(fake, *asked) as manager:
        assert (manager.attention_sms, manager.ffn_sms) == manager.sms == granted
        streams = manager.get_attention_stream(), manager.get_ffn_stream()
        attention, ffn = (fake.sms_of(handle) for handle, _ in streams)
        assert (len(attention), len(ffn)) == granted
        assert not attention & ffn
    assert (fake.streams, fake.contexts) == ({}, {})
    for use in (manager.get_attention_stream, manager.get_ffn_stream):
        with pytest.raises(RuntimeError, match="closed"):
            use()


def test_manager_refuses_counts_by_name_and_devices_that_are_not_cuda():
    fake = FakeDriver()
    for side in ("attention", "ffn"):
        with pytest.raises(ValueError, match=f"pipeline_{side}_sm_count=0 is not allowed"):
            manager_with(fake, **({"attention": 16, "ffn": 16} | {side: 0}))
    assert "cuGreenCtxCreate" not in fake.calls
    with pytest.raises(ValueError, match="device='cpu' is not allowed: it must be a CUDA device"):
        GreenContextManager(torch.device("cpu"), 16, 16)


def test_several_managers_live_side_by_side():
    fake = FakeDriver()
    splits = [(36, 96), (68, 64), (16, 16), (16, 16)]
    managers = [manager_with(fake, *split) for split in splits]
    assert [manager.sms for manager in managers] == splits
    managers[1].close()
    assert len(fake.contexts) == 6
    for manager in managers:
        manager.close()
    assert not fake.contexts
