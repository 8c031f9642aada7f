"""Facts about caption files before their media are looked at; what becomes of them: test_own_data.py."""

import json
import math

import pytest

from scl_jax.data.builders.caption_files import Problem, read_folder, read_rows
from scl_jax.data.builders.raw_files import table


@pytest.fixture
def media(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").touch()
    return tmp_path


def read(media, name, content):
    """The rows and problems of a caption file of this content."""
    (media / name).write_bytes(content)
    return list(read_rows(media / name, "auto", media, "", ""))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_by_its_entries(media, indent):
    entries = [{"image": "0.png", "caption": "a"}, "x", {"image": "1.png", "captions": ["später"]}]
    content = json.dumps(entries, indent=indent, ensure_ascii=False).encode("utf-8-sig")
    first, problem, second = read(media, "c.json", content)
    assert (first.captions, second.captions) == (("a",), ("später",))
    assert problem.reason == "a JSON str, not an object"
    assert [found.place.line for found in (first, problem, second)] == [1, 2, 3]


@pytest.mark.parametrize("content", [b"[]", b'["0.png", "a"]', b'["0.png", "a"]\n["1.png", "b"]'])
def test_a_line_that_is_an_array_is_none_of_objects(media, content):
    found = read(media, "c.jsonl", content)
    assert [problem.reason for problem in found] == ["a JSON array, not an object"] * len(content.splitlines())


def test_of_many_keys_a_few_are_said(media):
    [problem] = read(media, "c.json", json.dumps({f"{i}.png": ["c"] for i in range(500)}).encode())
    assert isinstance(problem, Problem)
    assert problem.reason.endswith("among: 0.png, 1.png, 2.png, 3.png, 4.png, 5.png, 6.png, 7.png, … (500 in all)")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["c.csv", "c.jsonl"])
def test_utf_16_is_recognised(media, encoding, name):
    with pytest.raises(ValueError, match=rf"{name} is UTF-16; save it as UTF-8"):
        read(media, name, "\ufeffimage,caption\n0.png,c\n".encode(encoding))


@pytest.mark.parametrize(
    ("name", "separator", "hint"),
    [
        ("c.csv", ";", "';'? save it with ','"),
        ("c.csv", "\t", "tabs? name it .tsv"),
        ("c.tsv", ",", "','? name it .csv"),
    ],
)
def test_another_separator_is_named(media, name, separator, hint):
    with pytest.raises(ValueError) as error:
        read(media, name, f"image{separator}caption\n0.png{separator}c\n".encode())
    assert str(error.value).endswith(f"; are they separated by {hint}")


@pytest.mark.parametrize("name", ["image", "caption", "split"])
def test_a_column_that_comes_twice_loses_no_text(media, name):
    content = f"image,caption,split,,,{name}\n0.png,a,train,,,b\n"
    with pytest.raises(ValueError, match=f"more than one column '{name}'; give each text a row of its own"):
        read(media, "c.csv", content.encode())


def test_what_pandas_writes_for_an_empty_field_is_empty(media):
    values = {"image": "0.png", "video": math.nan, "caption": "a", "id": math.nan, "split": math.nan}
    lines = [json.dumps(values), json.dumps(values | {"caption": math.nan})]
    row, problem = read(media, "c.jsonl", "\n".join(lines).encode())
    assert (row.kind, row.id, row.split) == ("image", "0.png", "")
    assert problem.reason == "empty caption"


@pytest.mark.parametrize("rest", ["1.png,b\n", '1.png,"b"\n', ""])
def test_a_quotation_mark_that_is_not_closed_is_said_with_the_lines_that_it_takes(media, rest):
    first, problem = read(media, "c.csv", f'image,caption\n0.png,a\n0.png,"not closed\n{rest}'.encode())
    assert first.captions == ("a",) and problem.place.line == 3
    assert "is a quotation mark not closed" in problem.reason
    assert ("Lines 3 to 4 were taken for one row" in problem.reason) == bool(rest)
    *rows, last = table(media / "c.csv", ",")
    assert [values for _, values in rows] == [{"image": "0.png", "caption": "a"}]
    assert last == (problem.place, problem.reason)


def test_a_table_of_an_owner_is_read_on_behind_a_malformed_row(media):
    (media / "t.csv").write_text(f'a,b\n1,{"x" * 200_000}\n2,"y\nz"\n3\n')
    (_, large), (place, row), (_, short) = table(media / "t.csv", ",")
    assert "field larger than" in large and row == {"a": "2", "b": "y\nz"} and place.line == 3
    assert short == "1 fields, but 2 are needed: a, b"
    (media / "t.csv").write_text('a,"b\n1,2\n')
    with pytest.raises(ValueError, match="t.csv: the first line: malformed CSV: unexpected end of data"):
        list(table(media / "t.csv", ","))


def test_texts_beside_files_are_divided_at_ends_of_lines_only(media):
    (media / "0.txt").write_bytes("first\r\nsecond\u2028still\rthird\n".encode("utf-8-sig"))
    (media / "1.txt").write_text("a\x85b")
    first, second = read_folder(media)
    assert first.captions == ("first", "second\u2028still", "third") and second.captions == ("a\x85b",)
