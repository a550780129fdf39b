"""Green contexts on a real GPU: kernels report which SMs they ran on, and when."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from green_ctx import DEFAULT_STREAM, Driver, GreenContextUnavailable, GreenDevice
from nanovllm.engine.green_manager import GreenContextManager, Partitions
from tests.gpu.recorded_sms import DEVICE, launch, new_records, sms_used


def run_eagerly(manager: GreenContextManager) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches on both streams; returns what the attention and the FFN side recorded."""
    attention, ffn = new_records(), new_records()
    launch(manager.get_attention_stream(), attention)
    launch(manager.get_ffn_stream(), ffn)
    torch.cuda.synchronize()
    return attention, ffn


def capture(
    manager: GreenContextManager, attention: torch.Tensor, ffn: torch.Tensor
) -> torch.cuda.CUDAGraph:
    """One graph with both sides: forks from the capturing stream, and joins back to it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        main = torch.cuda.current_stream()
        fork = main.record_event()
        for stream, records in (
            (manager.get_attention_stream(), attention),
            (manager.get_ffn_stream(), ffn),
        ):
            stream.wait_event(fork)
            launch(stream, records)
            main.wait_event(stream.record_event())
    return graph


def check_partitions(
    manager: GreenContextManager, attention: torch.Tensor, ffn: torch.Tensor
) -> None:
    attention_sms, ffn_sms = sms_used(attention), sms_used(ffn)
    assert not attention_sms & ffn_sms
    assert len(attention_sms) <= manager.attention_sms
    assert len(ffn_sms) <= manager.ffn_sms


@pytest.fixture(scope="module")
def device() -> GreenDevice:
    torch.zeros(1, device=DEVICE)  # brings the primary context up
    try:
        return GreenDevice(0)
    except GreenContextUnavailable as error:
        pytest.skip(str(error))


def counts_for(device: GreenDevice, case: str) -> tuple[int, int]:
    """(attention, FFN) requests in SMs that fit any device with 8 times the minimum or more."""
    sizes = device.granularity()
    unit = sizes.round_up(1, groups=2)
    if case == "equal":
        return 2 * unit, 2 * unit
    if case == "unequal":
        return 2 * unit, 5 * unit
    ffn = sizes.round_up(device.sm_count // 2)
    return device.sm_count - ffn, ffn


CASES = ["equal", "unequal", "whole device"]


@pytest.fixture(params=CASES)
def manager(device: GreenDevice, request: pytest.FixtureRequest) -> Iterator[GreenContextManager]:
    with GreenContextManager(DEVICE, *counts_for(device, request.param)) as manager:
        yield manager


@pytest.mark.parametrize("case", CASES)
def test_grants_what_was_asked_for(device, case):
    counts = counts_for(device, case)
    with GreenContextManager(DEVICE, *counts) as manager:
        assert manager.sms == counts
    assert device.sm_count == torch.cuda.get_device_properties(0).multi_processor_count


def test_granularity_agrees_with_what_the_driver_grants(device):
    sizes = device.granularity()
    for count in (1, sizes.minimum, sizes.minimum + 1, device.sm_count // 2):
        (group,) = device.split([count])
        assert group.sm_count == sizes.round_up(count)


def lanes_for(device: GreenDevice, lanes: int) -> list[int]:
    """Requests that fill the device: one large and some small groups, and first the remainder."""
    sizes = device.granularity()
    unit = sizes.round_up(1, groups=2)
    small = [unit] * (lanes - 2)
    large = [sizes.round_up(device.sm_count // 2, groups=2)] if lanes > 1 else []
    return [device.sm_count - sum(large + small), *large, *small]


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
def test_kernels_of_every_lane_run_on_sms_of_their_own(device, lanes):
    counts = lanes_for(device, lanes)
    with Partitions(DEVICE, counts) as partitions:
        assert partitions.sms == tuple(counts)
        all_records = [new_records() for _ in counts]
        for stream, records in zip(partitions.streams, all_records, strict=True):
            launch(stream, records)
        used = [sms_used(records) for records in all_records]
    assert [len(sms) for sms in used] == counts
    assert len(set.union(*used)) == device.sm_count


def test_eager_kernels_run_on_disjoint_sms(manager):
    check_partitions(manager, *run_eagerly(manager))


def test_captured_kernels_run_on_disjoint_sms(manager):
    run_eagerly(manager)  # compiles and loads the kernel, which a capture may not
    attention, ffn = new_records(), new_records()
    graph = capture(manager, attention, ffn)
    for _ in range(3):
        attention.fill_(-1)
        ffn.fill_(-1)
        graph.replay()
        check_partitions(manager, attention, ffn)
    graph.reset()


def test_captured_sides_run_at_the_same_time(manager):
    run_eagerly(manager)
    attention, ffn = new_records(), new_records()
    graph = capture(manager, attention, ffn)
    graph.replay()
    torch.cuda.synchronize()
    starts = [int(records[:, 1].min()) for records in (attention, ffn)]
    ends = [int(records[:, 2].max()) for records in (attention, ffn)]
    assert max(starts) < min(ends), "the two sides ran one after the other"


def test_several_managers_are_alive_at_once(device):
    managers = [GreenContextManager(DEVICE, *counts_for(device, case)) for case in CASES]
    for manager in managers:
        check_partitions(manager, *run_eagerly(manager))
    managers.pop(1).close()
    for manager in managers:  # the others go on
        check_partitions(manager, *run_eagerly(manager))
        manager.close()


def test_second_way_to_a_stream(device):
    class OldBindings:
        """The real bindings without the function that CUDA 12.4 did not have."""

        def __getattr__(self, name: str) -> Any:
            if name == "cuGreenCtxStreamCreate":
                raise AttributeError(name)
            return getattr(pytest.importorskip("cuda.bindings.driver"), name)

    counts = counts_for(device, "equal")
    with GreenContextManager(DEVICE, *counts, driver=Driver(OldBindings())) as manager:
        check_partitions(manager, *run_eagerly(manager))


def test_current_context_stays_what_it_was(device):
    before = int(device.driver("cuCtxGetCurrent"))
    manager = GreenContextManager(DEVICE, *counts_for(device, "equal"))
    assert int(device.driver("cuCtxGetCurrent")) == before
    manager.close()
    assert int(device.driver("cuCtxGetCurrent")) == before


def test_matrix_product_on_the_ffn_partition(manager):
    if manager.ffn_sms < 16:
        pytest.skip("cuBLAS is not given fewer than 16 SMs")
    a, b = (torch.randn(256, 1024, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    expected = (a.float() @ b.float().t()).bfloat16()
    torch.cuda.synchronize()
    with torch.cuda.stream(manager.get_ffn_stream()):
        product = a @ b.t()
    torch.cuda.synchronize()
    torch.testing.assert_close(product, expected, rtol=2e-2, atol=0.5)


def test_create_and_close_cost_no_more_than_the_driver_keeps(device):
    """Driver 580 keeps 4 MiB of every green context that it ever made, however it is destroyed.

    So what a manager costs is measured beside two bare contexts, created and destroyed.
    """
    counts = counts_for(device, "unequal")
    (resource,) = device.split([counts[1]])

    def bare() -> None:
        for _ in range(2):
            handles = list(resource.handles)
            descriptor = device.driver("cuDevResourceGenerateDesc", handles, len(handles))
            context = device.driver("cuGreenCtxCreate", descriptor, device.handle, DEFAULT_STREAM)
            device.driver("cuGreenCtxDestroy", context)

    def manager() -> None:
        with GreenContextManager(DEVICE, *counts) as both:
            both.get_attention_stream().synchronize()

    def cost(cycle: Callable[[], None], cycles: int = 100) -> int:
        for _ in range(10):  # the first ones fill the driver's own pools
            cycle()
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info(DEVICE)[0]
        for _ in range(cycles):
            cycle()
        torch.cuda.synchronize()
        return before - torch.cuda.mem_get_info(DEVICE)[0]

    least, whole = cost(bare), cost(manager)
    mib = 1 << 20
    assert whole < least + 16 * mib, f"{whole / mib:.0f} MiB, and {least / mib:.0f} for bare ones"
