"""The picture of a map: cells, colours, title."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from nanovllm.bench.heat_map import draw_map
from tests.bench_maps import make_map, make_point, make_shape, random_shape

BATCHES = {"0.6B": [1, 8, 32], "14B": [1, 8]}
CONTEXTS = {"0.6B": [128, 512], "14B": [128, 512, 1024]}


class TestPicture:
    @pytest.fixture
    def figure(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Where drawn figures are put, instead of in a file."""
        figures: list[Any] = []
        monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
        return figures

    def test_every_point_is_in_its_cell(self, figure: list[Any]) -> None:
        shapes = [random_shape(name, BATCHES[name], CONTEXTS[name]) for name in BATCHES]
        draw_map(make_map(*shapes), Path("map.png"))
        panels = figure[0].axes[:4]
        for panel, shape, field in zip(
            panels, shapes * 2, ["best_gain"] * 2 + ["auto_gain"] * 2, strict=True
        ):
            assert panel.get_title().startswith(f"{shape['name']}: ")
            contexts, batches = CONTEXTS[shape["name"]], BATCHES[shape["name"]]
            assert [label.get_text() for label in panel.get_yticklabels()] == [*map(str, batches)]
            if panel in panels[2:]:
                texts = [label.get_text() for label in panel.get_xticklabels()]
                assert texts == [*map(str, contexts)]
            numbers = {}
            for text in panel.texts:
                if text.get_fontsize() > 8:
                    x, y = text.get_position()
                    numbers[batches[round(y)], contexts[round(x)]] = text.get_text()
            assert numbers == {
                (point["batch"], point["context"]): "-"
                if point[field] is None
                else f"{point[field]:.2f}"
                for point in shape["points"]
                if point["reason"] is None
            }
            hatched = [patch for patch in panel.patches if patch.get_hatch()]
            assert [patch.get_xy() for patch in hatched] == [
                (len(contexts) - 1.5, len(batches) - 1.5)
            ]

    def test_colours_tell_gain_from_loss_and_labels_the_arm(self, figure: list[Any]) -> None:
        points = [
            make_point(8, 128, sequential=1.0, green_36P96=0.8),
            make_point(8, 512, sequential=1.0, microbatch=1.25),
            make_point(8, 1024, sequential=1.0, streams=1.0),
        ]
        draw_map(make_map(make_shape("8B", points)), Path("map.png"))
        panel = figure[0].axes[0]
        gain, loss, same = (patch.get_facecolor() for patch in panel.patches)
        assert gain[2] > gain[0]
        assert loss[0] > loss[2]
        assert min(same[:3]) > 0.95
        assert {text.get_text() for text in panel.texts} >= {"36+96", "2 parts", "streams"}

    def test_has_no_row_for_an_auto_that_was_not_timed(self, figure: list[Any]) -> None:
        auto = make_shape("8B", [make_point(8, 128, sequential=1.0, streams=0.9, auto=1.0)])
        fixed = make_shape("8B", [make_point(8, 128, sequential=1.0, streams=0.9)])
        titles = []
        for shape in (auto, fixed):
            draw_map(make_map(shape), Path("map.png"))
            titles.append([panel.get_title() for panel in figure[-1].axes if panel.get_title()])
        assert titles == [["8B: best fixed arm", "8B: auto"], ["8B: best fixed arm"]]

    def test_the_title_says_where_and_when(self, figure: list[Any]) -> None:
        draw_map(make_map(random_shape("8B", [1, 8], [128])), Path("map.png"))
        title = figure[0].get_suptitle()
        assert title.endswith(
            "NVIDIA Something, driver 580.1, torch 2.11.0, triton 3.6.0, 2026-11-23"
        )
