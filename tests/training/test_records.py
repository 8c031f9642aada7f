"""Files that survive a kill at any moment."""

import json
import math

import pytest

from scl_jax.training.records import JsonLines, read_lines, write_json


def test_json_is_replaced_in_one_motion(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, {"a": 1.5, "bad": math.nan, "list": (1, math.inf)})
    assert json.loads(path.read_text()) == {"a": 1.5, "bad": None, "list": [1, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text())["a"] == 1.5
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]  # nothing is left beside it


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3}', "\x00\x00\x00"])
def test_a_last_line_cut_short_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    assert [record["step"] for record in read_lines(path)] == [1, 2]
    lines = JsonLines(path)
    lines.append({"step": 3, "loss": 0.5})
    lines.close()
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]


def test_lines_are_on_disk_as_soon_as_they_are_appended(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.append({"step": 1, "loss": math.nan})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'
    lines.close()


def test_truncation_keeps_what_came_before(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        lines.append({"step": step})
    lines.truncate_after(3)
    lines.append({"step": 4, "again": 1})
    lines.close()
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        read_lines(path)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        read_lines(path)
