"""Maps read from files, several of them as one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.bench import BenchError
from nanovllm.bench.gains import summarize
from nanovllm.bench.stored import read_map, write_record
from tests.bench_maps import make_map, make_point, make_shape, run_map


class TestStored:
    def test_maps_of_several_files_are_one(self, tmp_path: Path) -> None:
        old = make_point(8, 128, sequential=1.0, streams=2.0)
        new = make_point(8, 128, sequential=1.0, streams=0.5)
        extra = make_point(8, 512, sequential=1.0, streams=0.9)
        first = make_map(make_shape("8B", [old]), make_shape("4B", [old]))
        second = make_map(make_shape("14B", [extra]), make_shape("8B", [new, extra]))
        second |= {"date": "2026-11-24T10:00:00+00:00", "seconds_per_arm": 1.0}
        write_record(first, tmp_path / "a.json")
        write_record(second, tmp_path / "b.json")
        record = read_map([tmp_path / "a.json", tmp_path / "b.json"])
        points = {shape["name"]: shape["points"] for shape in record["shapes"]}
        assert points == {"4B": [old], "8B": [new, extra], "14B": [extra]}
        assert [*points] == ["4B", "8B", "14B"], "shapes are not ordered by size"
        assert [shape["date"] for shape in record["shapes"]] == [
            first["date"],
            second["date"],
            second["date"],
        ]
        assert [shape["seconds_per_arm"] for shape in record["shapes"]] == [0.3, 1.0, 1.0]
        assert record["seconds_per_arm"] == 0.3
        assert record["sweep_seconds"] == 200
        assert record["summary"] == summarize(record["shapes"])

    def test_new_arms_come_first_in_their_order(self, tmp_path: Path) -> None:
        old, new = make_shape("8B", []), make_shape("8B", [])
        sequential, streams, green, auto = old["arms"]
        old["arms"], new["arms"] = [sequential, streams], [sequential, auto, green]
        for name, shape in ("a", old), ("b", new):
            write_record(make_map(shape), tmp_path / f"{name}.json")
        (shape,) = read_map([tmp_path / "a.json", tmp_path / "b.json"])["shapes"]
        assert shape["arms"] == [sequential, auto, green, streams]

    def test_not_of_two_machines(self, tmp_path: Path) -> None:
        shape = make_shape("8B", [])
        write_record(make_map(shape), tmp_path / "a.json")
        write_record(make_map(shape, device="another"), tmp_path / "b.json")
        with pytest.raises(BenchError, match="device differ"):
            read_map([tmp_path / "a.json", tmp_path / "b.json"])

    def test_not_with_other_layers(self, tmp_path: Path) -> None:
        shape = make_shape("8B", [])
        write_record(make_map(shape), tmp_path / "a.json")
        shape["model"]["layers"] = 4
        write_record(make_map(shape), tmp_path / "b.json")
        with pytest.raises(BenchError, match="8B does not have as many layers"):
            read_map([tmp_path / "a.json", tmp_path / "b.json"])

    @pytest.mark.parametrize("text", ["", "[1]", '{"benchmark": "nano"}'])
    def test_a_file_with_something_else(
        self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "other.json"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            run_map("--from", file)
        assert f"--from {file}" in capsys.readouterr().err
