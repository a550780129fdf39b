"""What a map says: gains, the regions that have one, and a summary, of made-up times."""

from __future__ import annotations

import random

import pytest

from nanovllm.bench import sweep
from nanovllm.bench.gains import judge, regions, summarize
from nanovllm.bench.map_report import format_map
from tests.bench_maps import make_map, make_point, make_shape


class TestGains:
    def test_best_is_neither_sequential_nor_auto(self) -> None:
        verdict = judge({"sequential": 2.0, "streams": 2.5, "green 36+96": 1.6, "auto": 1.5})
        assert verdict["gains"] == pytest.approx(
            {"streams": 0.8, "green 36+96": 1.25, "auto": 4 / 3}
        )
        assert (verdict["best"], verdict["best_gain"]) == ("green 36+96", 1.25)
        assert verdict["auto_gain"] == pytest.approx(4 / 3)
        assert verdict["auto_of_best"] == 1
        assert verdict["auto_holds"]

    @pytest.mark.parametrize(
        ("times", "holds"),
        [
            ({"sequential": 1.0, "auto": 1.009}, True),
            ({"sequential": 1.0, "auto": 1.011}, False),
            ({"sequential": 1.0, "green": 0.8, "auto": 0.815}, True),
            ({"sequential": 1.0, "green": 0.8, "auto": 0.817}, False),
            ({"sequential": 1.0, "green": 0.8}, None),
        ],
    )
    def test_what_auto_promises(self, times: dict[str, float], holds: bool | None) -> None:
        assert judge(times)["auto_holds"] is holds

    @pytest.mark.parametrize("seed", range(20))
    def test_regions_are_those_of_a_plain_search(self, seed: int) -> None:
        """Against labels that spread to neighbours until nothing changes."""
        draw = random.Random(seed)
        batches, contexts = [1, 8, 32, 128, 256], [128, 512, 1024, 2048]
        points = [
            make_point(b, c, sequential=1.0, streams=1 / draw.choice([1.2, 1.06, 1.04, 0.7]))
            for b in batches
            for c in contexts
        ]
        draw.shuffle(points)
        gains = {
            (batches.index(p["batch"]), contexts.index(p["context"])): p["best_gain"]
            for p in points
        }
        label = {cell: i for i, (cell, gain) in enumerate(gains.items()) if gain >= 1.05}
        changed = True
        while changed:
            changed = False
            for a in label:
                for b in label:
                    near = abs(a[0] - b[0]) + abs(a[1] - b[1]) == 1
                    if near and label[b] > label[a]:
                        label[b], changed = label[a], True
        expected = {
            frozenset((batches[i], contexts[j]) for (i, j), n in label.items() if n == number)
            for number in set(label.values())
        }
        found = regions(make_shape("8B", points))
        assert {frozenset(map(tuple, region["cells"])) for region in found} == expected
        sizes = [len(region["cells"]) for region in found]
        assert sizes == sorted(sizes, reverse=True)
        for region in found:
            cells = [tuple(cell) for cell in region["cells"]]
            inside = [p["best_gain"] for p in points if (p["batch"], p["context"]) in cells]
            assert (region["least_gain"], region["most_gain"]) == (min(inside), max(inside))

    def test_the_summary_finds_the_extremes(self) -> None:
        shapes = [
            make_shape(
                "0.6B",
                [
                    make_point(1, 128, sequential=1.0, auto=1.02),
                    make_point(8, 128, sequential=1.0, streams=0.99, auto=1.0),
                ],
            ),
            make_shape(
                "8B",
                [
                    make_point(8, 128, sequential=1.0, streams=0.8, green_36P96=0.9, auto=0.85),
                    make_point(8, 512, sequential=1.0, streams=1.1, auto=1.0),
                    sweep.unmeasured_point(8, 8192, "too large"),
                ],
            ),
        ]
        summary = summarize(shapes)
        assert (summary["points"], summary["not_measured"]) == (4, 1)
        worst = summary["worst_auto"]
        assert (worst["shape"], worst["batch"], worst["context"]) == ("0.6B", 1, 128)
        best = summary["best"]
        assert (best["shape"], best["context"], best["best"]) == ("8B", 128, "streams")
        assert [(fail["shape"], fail["batch"]) for fail in summary["auto_fails"]] == [
            ("0.6B", 1),
            ("8B", 8),
        ]
        text = format_map(make_map(*shapes))
        assert "4 points in 100 s, 0.3 s of steps an arm; 1 more do not fit" in text
        assert "best gain: 1.250 by streams, 8B batch 8 context 128" in text
        assert "worst auto: 0.980, 0.6B batch 1 context 128" in text
        assert "  not at 8B batch 8 context 128: 1.176, 0.941 of the best" in text
        assert "gain 1.05 or more: 8B, batch 8 to 8, context 128 to 128: 1 point, 1.250" in text
