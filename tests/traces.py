"""What a Chrome trace of pipelined steps must show."""

from collections import Counter
from itertools import pairwise


def check_trace(events: list[dict], layers: int, micro_batches: int) -> int:
    """Checks that a Chrome trace shows every stage of every step; returns how many steps."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert list(names.values()) == ["attention", "ffn"]
    boxes = [event for event in events if event["ph"] == "X"]
    assert len(boxes) + len(names) == len(events)
    for row, lane in names.items():
        inside = sorted((b for b in boxes if b["tid"] == row), key=lambda box: box["ts"])
        assert {box["cat"] for box in inside} == {lane}
        for box, following in pairwise(inside):
            assert box["dur"] >= 0
            assert box["ts"] + box["dur"] <= following["ts"] + 1e-3, "boxes of a row overlap"
    drawn = Counter(
        (b["args"]["step"], stage, b["args"]["micro_batch"])
        for b in boxes
        for stage in b["args"]["stages"]
    )
    num_steps = 1 + max(box["args"]["step"] for box in boxes)
    # Whatever the model does before attention of layer 0 may be one stage or several.
    expected = {f"{kind}{layer}" for kind in ("qkv", "attention", "mlp") for layer in range(layers)}
    stages = {stage for _, stage, _ in drawn}
    assert stages >= expected
    assert drawn == Counter(
        (step, stage, micro_batch)
        for step in range(num_steps)
        for stage in stages
        for micro_batch in range(micro_batches)
    )
    return num_steps
