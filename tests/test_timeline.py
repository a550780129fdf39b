"""What is said of the times of the stages: statistics, the printed block, traces and pictures."""

import json
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import figure
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nanovllm.engine.pipeline_scheduler import PipelineScheduler
from nanovllm.engine.pipeline_statistics import KEPT_STEPS, PipelineStatistics, overlap
from nanovllm.engine.plan import Work
from nanovllm.engine.stage_times import Span, StageTimer
from nanovllm.models.stage import Stage
from nanovllm.utils.timeline import save_timeline, trace_events
from tests.checkpoints import Shape
from tests.decode_cases import DecodeCase
from tests.traces import check_trace

LAST_MS = 40
LAYERS = 3


def span(lane: str, start: float, end: float, micro_batch: int = 0, layer: int = 0) -> Span:
    return Span(lane, micro_batch, ((lane, layer),), start, end)


# Spans on whole milliseconds, so that what runs at each half tells all.
SPANS = st.lists(
    st.builds(
        lambda lane, start, length: span(lane, start, start + length),
        st.sampled_from(("attention", "ffn", "qkv")),
        st.integers(0, 30),
        st.integers(0, 10),
    ),
    max_size=12,
)


@given(SPANS)
def test_overlap_is_what_a_look_at_every_moment_finds(spans):
    def running(moment: float) -> set[str]:
        return {s.lane for s in spans if s.start_ms < moment < s.end_ms}

    moments = [tick + 0.5 for tick in range(LAST_MS)]
    assert overlap(spans) == overlap(spans[::-1]) == sum(len(running(m)) > 1 for m in moments)


def test_statistics_are_means_over_the_profiled_steps():
    statistics = PipelineStatistics(mode="green")
    for total_ms in (6.0, 10.0):
        statistics.count_step(4, pipelined=True)
        statistics.add_times([span("attention", 0.0, 3.0), span("ffn", 1.0, 5.0, 1)], total_ms)
    statistics.count_step(1, pipelined=False)
    stats = statistics.as_dict()
    assert stats["avg_attention_ms"] == 3.0
    assert stats["avg_ffn_ms"] == 4.0
    assert stats["avg_total_ms"] == 8.0
    assert stats["overlap_share"] == 2 * 2.0 / 16.0
    assert stats["steps"] == {"pipelined": 2, "sequential": 1}
    assert stats["tokens"] == {"pipelined": 8, "sequential": 1}
    assert (stats["total_tokens"], stats["profiled_steps"]) == (9, 2)
    stats["tokens"]["pipelined"] = 99  # of the caller's
    assert statistics.as_dict()["tokens"] == {"pipelined": 8, "sequential": 1}


def test_whatever_is_not_attention_counts_as_ffn():
    statistics = PipelineStatistics(lane_sms={"attention": 36, "ffn": 80, "qkv": 16})
    statistics.add_times([span("ffn", 0, 3), span("attention", 0, 5), span("qkv", 1, 2)], 5.0)
    stats = statistics.as_dict()
    assert (stats["avg_attention_ms"], stats["avg_ffn_ms"]) == (5.0, 4.0)
    assert (stats["attention_sms"], stats["ffn_sms"]) == (36, 96)


def test_without_profiling_there_are_no_times():
    statistics = PipelineStatistics()
    statistics.count_step(3, pipelined=False)
    stats = statistics.as_dict()
    for name in ("avg_attention_ms", "avg_ffn_ms", "avg_total_ms", "overlap_share"):
        assert stats[name] is None
    assert statistics.format().splitlines()[:5] == [
        "[Pipeline Statistics]",
        "  Total tokens processed: 3",
        "  Avg attention time: not profiled",
        "  Avg FFN time: not profiled",
        "  Avg total time: not profiled",
    ]


def test_only_the_last_steps_are_kept():
    statistics = PipelineStatistics()
    for step in range(KEPT_STEPS + 5):
        statistics.add_times([span("ffn", 0.0, 1.0, layer=step)], 1.0)
    layers = [step[0].stages[0][1] for step in statistics.recent]
    assert layers == list(range(5, KEPT_STEPS + 5))
    assert statistics.profiled_steps == KEPT_STEPS + 5


def test_times_are_from_the_beginning_of_the_step(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    timer = StageTimer(torch.device("cpu"))
    stages = tuple(Stage(name, 3, lambda batch: None) for name in ("mlp", "qkv"))
    for _ in range(2):  # a step forgets the one before
        now = 5.0
        timer.begin_step()
        now = 5.01
        begin = timer.mark()
        now = 5.03
        timer.add(Work("ffn", 1, stages), begin)
        now = 5.06
        timer.end_step()
    (only,), total_ms = timer.read()
    assert (only.lane, only.micro_batch, only.stages) == ("ffn", 1, (("mlp", 3), ("qkv", 3)))
    assert (only.start_ms, only.end_ms, total_ms) == pytest.approx((10, 30, 60))


def real_steps(count: int, sequences: int) -> list[list[Span]]:
    case = DecodeCase(Shape(layers=LAYERS), sequences)
    scheduler = PipelineScheduler(case.model)
    for _ in range(count):
        scheduler.decode_token(*case.whole())
    return list(scheduler.statistics.recent)


@pytest.fixture(scope="module")
def steps() -> list[list[Span]]:
    """The stages of four real steps of two micro-batches."""
    return real_steps(4, sequences=4)


def test_a_trace_has_a_box_for_every_stage_layer_and_micro_batch(steps, tmp_path):
    path = tmp_path / "steps.json"
    save_timeline(steps, str(path))
    events = json.loads(path.read_text())["traceEvents"]
    assert check_trace(events, LAYERS, 2) == len(steps)
    names = {event["name"] for event in events}
    assert {"A attention0", "B attention2", "A mlp0 qkv1", "B mlp2"} <= names
    assert check_trace(trace_events(real_steps(1, sequences=1)), LAYERS, 1) == 1


def test_lanes_have_a_row_each_whatever_their_number():
    events = trace_events([[span("qkv", 0, 1), span("ffn", 1, 2), span("attention", 1, 4)]])
    rows = [event["args"]["name"] for event in events if event["ph"] == "M"]
    assert rows == ["attention", "qkv", "ffn"]


def test_boxes_have_their_times_in_microseconds_and_steps_follow_each_other(steps):
    boxes = [e for e in trace_events(steps) if e["ph"] == "X"]
    for span, box in zip(steps[0], boxes, strict=False):
        assert box["ts"] == pytest.approx(span.start_ms * 1e3)
        assert box["dur"] == pytest.approx((span.end_ms - span.start_ms) * 1e3)
    for step in range(1, len(steps)):
        ended = max(b["ts"] + b["dur"] for b in boxes if b["args"]["step"] == step - 1)
        assert ended < min(b["ts"] for b in boxes if b["args"]["step"] == step)


def test_a_picture_shows_the_last_pipelined_step(steps, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "nanovllm.utils.timeline.draw", lambda spans, *rest: drawn.append((spans, rest))
    )
    alone = [[span for span in steps[0] if span.micro_batch == 0]]
    save_timeline([*steps, *alone], "steps.png", "tiny")
    save_timeline(alone, "steps.png", ordinary=alone)
    assert drawn == [
        (steps[-1], ("steps.png", "tiny", [])),
        (alone[0], ("steps.png", "", alone[0])),
    ]


def test_labels_of_a_picture_lie_within_their_boxes(steps, tmp_path, monkeypatch):
    figures = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **o: (figures.append(self), save(self, *a, **o))
    )
    rows = [("attention", 0), ("ffn", 1)]
    regular = [
        Span(lane, batch, (("attention", layer),), 10 * layer + start, 10 * layer + start + 5)
        for layer in range(8)
        for start, (lane, batch) in zip((0, 5), rows, strict=True)
    ]
    narrow = Span("ffn", 0, (("mlp", -1), ("qkv", 0)), 0.0, 0.4)
    short = Span("ffn", 0, (("mlp", 0), ("qkv", 1)), 0.5, 2.5)  # for one line of two
    path = tmp_path / "steps.png"
    save_timeline([[narrow, short, *regular]], str(path), "8B on a GPU", [regular])
    (drawn,) = figures
    axes = drawn.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["ordinary", "FFN", "attention"]
    assert axes.get_title() == "8B on a GPU: first 6 layers of a decode step"
    texts = [text.get_text() for text in axes.texts if text.get_text()]
    assert sorted(texts) == sorted(
        [f"{prefix}{layer}\nattention" for layer in range(6) for prefix in ("", "", "A", "B")]
        + ["A0"]
    )
    renderer = FigureCanvasAgg(drawn).get_renderer()
    places = [text.get_window_extent(renderer) for text in axes.texts if text.get_text()]
    boxes = [box.get_window_extent(renderer) for box in axes.patches]
    assert all(
        any(
            box.x0 <= p.x0 and p.x1 <= box.x1 and box.y0 <= p.y0 and p.y1 <= box.y1 for box in boxes
        )
        for p in places
    )


def test_without_profiled_steps_there_is_nothing_to_draw(tmp_path):
    path = tmp_path / "steps.json"
    with pytest.raises(ValueError, match="pipeline_enable_profiling must be True"):
        save_timeline([], str(path))
    assert not path.exists()
