"""Orders are data: made of stages and a plan, and issued by the loop that README shows."""

import dataclasses
import inspect
import textwrap
from pathlib import Path

import pytest

from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.plan import (
    LANES3,
    MAIN,
    MICROBATCH,
    STREAMS,
    PlannedLane,
    Work,
    make_order,
)
from nanovllm.models.stage import Stage


def names(works: list[Work]) -> list[str]:
    return [
        "".join(f"{stage.name}{stage.layer} " for stage in work.stages) + "ABCD"[work.micro_batch]
        for work in works
        if work.lane != MAIN
    ]


def chain_of(layers: int) -> list[Stage]:
    kinds = ("qkv", "attention", "mlp")
    return [Stage(name, layer, lambda batch: None) for layer in range(layers) for name in kinds]


def test_the_seeds_pipeline_alternates_the_two_lanes():
    order = make_order(chain_of(2), STREAMS, 2)
    assert names(order) == [
        "qkv0 A", "qkv0 B", "attention0 A", "attention0 B", "mlp0 qkv1 A", "mlp0 qkv1 B",
        "attention1 A", "attention1 B", "mlp1 A", "mlp1 B",
    ]  # fmt: skip
    assert sum(work.waits for work in order) == 1 + 4 * 2 + 1
    assert [work.micro_batch for work in order if work.lane == MAIN] == [1]


def test_a_lane_of_its_own_for_qkv_is_pure_data():
    order = make_order(chain_of(2), LANES3, 3)
    lanes = {stage.name: work.lane for work in order for stage in work.stages}
    assert lanes == {"attention": "attention", "mlp": "ffn", "qkv": "qkv"}
    assert names(order)[3:9] == [
        "attention0 A", "attention0 B", "attention0 C", "mlp0 A", "mlp0 B", "mlp0 C"
    ]  # fmt: skip
    assert LANES3.with_sms((36, 80, 16)).name == "lanes3 36+80+16"


def test_the_readme_shows_the_loop_as_it_is():
    loop = textwrap.dedent(inspect.getsource(PipelineScheduler.issue)).rstrip()
    readme = Path(__file__).resolve().parent.parent / "README.md"
    assert f"```python\n{loop}\n```" in readme.read_text(encoding="utf-8")
    assert len(loop.splitlines()) <= 25


def test_a_stage_without_a_lane_is_a_clear_error():
    plan = dataclasses.replace(MICROBATCH, lanes=(PlannedLane("attention", ("attention",)),))
    with pytest.raises(ValueError, match=r"stage='qkv'.*'microbatch'"):
        make_order(chain_of(1), plan, 2)
