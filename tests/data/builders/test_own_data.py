"""Facts about own_data: what its formats mean, how it splits, and what it says of bad input."""

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from scl_jax.data.builders import open_source, prepare
from scl_jax.data.builders.problems import LEFT_OUT_FILE, BrokenRecordsError, why_broken

NAME = "own_data/test"


def write_image(path, colour=(255, 0, 0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), colour).save(path)


def write_video(path, frames=5):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(frames):
            picture = np.full((32, 32, 3), 40 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_sound(path):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_jsonl(path, rows):
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)


@pytest.fixture
def media(tmp_path):
    folder = tmp_path / "media"
    for i in range(20):
        write_image(folder / f"{i:02d}.png", (10 * i, 0, 0))
    return folder


def records(tmp_path, split="train"):
    source = open_source(NAME, split, tmp_path / "out")
    return [source[i] for i in range(len(source))]


def prepared(tmp_path, media, captions, **options):
    captions = [captions] if isinstance(captions, str) else captions
    options = {"validation": 0, "test": 0, **options}
    prepare(NAME, tmp_path / "out", captions=captions, media=str(media), workers=1, **options)
    return records(tmp_path)


def problems(tmp_path, media, rows, **options):
    """(line, reason) of what stops the preparation of a JSONL file with these rows and a good one."""
    captions = write_jsonl(tmp_path / "captions.jsonl", [*rows, {"image": "19.png", "caption": "good"}])
    with pytest.raises(BrokenRecordsError) as error:
        prepared(tmp_path, media, captions, **options)
    listed = (tmp_path / "out" / NAME / LEFT_OUT_FILE).read_text().splitlines()
    assert [json.loads(line)["reason"] for line in listed] == [problem.reason for problem in error.value.problems]
    assert not list((tmp_path / "out").rglob("*array_record*"))
    return [(problem.place.line, problem.reason) for problem in error.value.problems]


# ---- formats ----


def test_rows_of_one_file_become_one_record_with_its_original_bytes(tmp_path, media):
    rows = [
        {"image": "00.png", "caption": " a red box "},
        {"image": "01.png", "captions": ["two", "three"], "id": 7},
        {"image": "./00.png", "caption": "again"},
        {"image": "00.png", "caption": "a red box"},
    ]
    found = prepared(tmp_path, media, write_jsonl(tmp_path / "captions.jsonl", [*rows, b""]))
    assert found == [
        {"id": "00.png", "media": (media / "00.png").read_bytes(), "captions": ["a red box", "again"]},
        {"id": "7", "media": (media / "01.png").read_bytes(), "captions": ["two", "three"]},
    ]


def test_what_is_passed_over_is_counted(tmp_path, media):
    rows = [
        {"image": "00.png", "captions": ["a", "b", "a"], "url": "x", "[/]": 1},
        {"image": "00.png", "caption": "a", "url": "x", "scene": 1},
        {"image": "01.png", "caption": "a", "id": 7, "split": ""} | {f"k{i}": 0 for i in range(20)},
    ]
    [first, _] = prepared(tmp_path, media, write_jsonl(tmp_path / "captions.jsonl", rows))
    assert first["captions"] == ["a", "b"]
    notes = json.loads((tmp_path / "out" / NAME / "1.0.0" / "metadata.json").read_text())["notes"]["caption files"]
    assert notes["captions that a file has already, kept once"] == 2
    assert notes["row(s) with 'url', which is not used"] == 2 and notes["row(s) with '[/]', which is not used"] == 1
    assert notes["more keys or columns that are not used"] == 13 and len(notes) == 12


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t")])
def test_tables_with_byte_order_mark_quotes_and_line_breaks(tmp_path, media, suffix, separator):
    text = 'media|caption|id\n00.png|"left, then\n""up"""|\n01.png|später|b\n'.replace("|", separator)
    path = tmp_path / f"captions.{suffix}"
    path.write_text(text, encoding="utf-8-sig")
    found = prepared(tmp_path, media, str(path))
    assert [(r["id"], r["captions"]) for r in found] == [("00.png", ['left, then\n"up"']), ("b", ["später"])]


def test_videos_are_stored_as_they_are(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name)
    captions = write_jsonl(tmp_path / "c.jsonl", [{"video": n, "caption": n[0]} for n in ("a.mp4", "b.mp4")])
    found = prepared(tmp_path, tmp_path, captions)
    assert [r["captions"] for r in found] == [["a"], ["b"]]
    assert found[0]["media"] == (tmp_path / "a.mp4").read_bytes()


def test_an_animated_gif_is_a_video_where_it_is_called_one(tmp_path, media):
    frames = [Image.new("RGB", (20, 10), (80 * k, 0, 0)) for k in range(3)]
    frames[0].save(media / "a.gif", save_all=True, append_images=frames[1:])
    whole = (media / "a.gif").read_bytes()
    captions = write_jsonl(tmp_path / "c.jsonl", [{"video": "a.gif", "caption": "c"}])
    assert [r["media"] for r in prepared(tmp_path, media, captions)] == [whole]
    assert why_broken(whole, "image") == "" and why_broken(whole[:12], "video")


def test_folder_with_texts_beside_the_files_needs_no_caption_file(tmp_path):
    media = tmp_path / "media"
    for name in ("a", "sub/b"):
        write_image(media / f"{name}.png")
        (media / f"{name}.txt").write_text("first\n\nsecond\n")
    found = prepared(tmp_path, media, [])
    assert [(r["id"], r["captions"]) for r in found] == [
        ("a.png", ["first", "second"]),
        ("sub/b.png", ["first", "second"]),
    ]
    write_image(media / "lonely.png")
    (media / "text.txt").write_text("no picture")
    write_image(media / "a.jpg")
    with pytest.raises(BrokenRecordsError) as error:
        prepare(NAME, tmp_path / "again", media=str(media))
    reasons = sorted(problem.reason for problem in error.value.problems)
    assert len(reasons) == 3
    assert reasons[0] == "describes more than one file: a.png too"
    assert reasons[1:] == ["no lonely.txt with its captions beside it", "no media file beside it"]


def test_vilt_arrow_files(tmp_path):
    pa = pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    columns = {"image": [buffer.getvalue()] * 2, "caption": [["one", "two"], ["three"]], "image_id": ["x", "y"]}
    for part in ("train", "val"):
        table = pa.table({**columns, "split": [part, part]})
        with pa.ipc.new_file(str(tmp_path / f"set_{part}.arrow"), table.schema) as writer:
            writer.write_table(table)
    prepare(NAME, tmp_path / "out", captions=[str(tmp_path / "*.arrow")])
    found = records(tmp_path)
    assert [(r["id"], r["captions"]) for r in found] == [
        ("set_train/0000000", ["one", "two"]),
        ("set_train/0000001", ["three"]),
    ]
    assert found[0]["media"] == buffer.getvalue()
    assert len(records(tmp_path, "validation")) == 2
    table = pa.table({"image": pa.array([None], pa.binary()), "caption": ["c"]})
    with pa.ipc.new_file(str(tmp_path / "empty.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(BrokenRecordsError) as error:
        prepare(NAME, tmp_path / "null", captions=[str(tmp_path / "empty.arrow")])
    assert "no bytes" in error.value.problems[0].reason
    (tmp_path / "bad.arrow").write_bytes(b"ARROW1, but no")
    with pytest.raises(ValueError, match="is no arrow file"):
        prepare(NAME, tmp_path / "again", captions=[str(tmp_path / "bad.arrow")])


def test_true_sentences_of_nlvr_caption_six_images_and_scenes_stay_together(tmp_path):
    rows = []
    for n in range(40):
        for m, label in enumerate(("true", "false", "true")):
            rows.append({"sentence": f"statement {n}", "label": label, "identifier": f"{n}-{m}", "directory": "2"})
            for k in range(6):
                write_image(tmp_path / f"images/2/dev-{n}-{m}-{k}.png")
    captions = write_jsonl(tmp_path / "dev.json", rows)
    prepare(NAME, tmp_path / "out", captions=[captions], media=str(tmp_path / "images"), format="nlvr")
    splits = {split: records(tmp_path, split) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 40 * 2 * 6
    scenes = {split: {r["captions"][0] for r in found} for split, found in splits.items()}
    assert sum(map(len, scenes.values())) == 40
    assert {r["id"].split("-")[2] for found in splits.values() for r in found} == {"0", "2"}


def test_whole_paths_and_ways_round_count_where_they_end_in_the_media_folder(tmp_path, media):
    (tmp_path / "link").symlink_to(media)
    (media / "sub").mkdir()
    names = (str(media / "00.png"), str(tmp_path / "link" / "01.png"), "sub/../02.png")
    captions = write_jsonl(tmp_path / "c.jsonl", [{"image": name, "caption": "c"} for name in names])
    for folder in (media, tmp_path / "link"):
        prepare(NAME, tmp_path / f"of_{folder.name}", captions=[captions], media=str(folder), validation=0, test=0)
        source = open_source(NAME, "train", tmp_path / f"of_{folder.name}")
        assert [source[i]["id"] for i in range(3)] == ["00.png", "01.png", "02.png"]


# ---- splits ----


def test_splits_from_a_column_and_from_one_file_each(tmp_path, media):
    rows = [{"image": f"{i:02d}.png", "caption": "c", "split": s} for i, s in enumerate(("train", "val", "test2"))]
    prepared(tmp_path, media, write_jsonl(tmp_path / "c.jsonl", rows), validation=None, test=None)
    assert [r["id"] for r in records(tmp_path, "validation")] == ["01.png"]
    assert [r["id"] for r in records(tmp_path, "test2")] == ["02.png"]
    files = [
        f"{split}={write_jsonl(tmp_path / f'{split}.jsonl', [{'image': f'{i:02d}.png', 'caption': 'c'}])}"
        for i, split in enumerate(("train", "val"))  # as in a column, val means validation
    ]
    prepare(NAME, tmp_path / "again", captions=files, media=str(media))
    assert open_source(NAME, "validation", tmp_path / "again")[0]["id"] == "01.png"
    with pytest.raises(ValueError, match="--captions=all=.*: split 'all' is no name of letters"):
        prepare(NAME, tmp_path / "all", captions=[f"all={tmp_path / 'val.jsonl'}"], media=str(media))


def test_hashed_splits_are_stable_and_no_group_lies_in_two(tmp_path, media):
    rows = [{"image": f"{i:02d}.png", "caption": "c", "scene": i // 2} for i in range(20)]
    parts = []
    for count in (16, 20):
        captions = write_jsonl(tmp_path / "c.jsonl", rows[:count])
        out = tmp_path / f"out{count}"
        options = {"media": str(media), "validation": 0.3, "test": 0.3, "split_by": "scene"}
        prepare(NAME, out, captions=[captions], **options)
        sources = {split: open_source(NAME, split, out) for split in ("train", "validation", "test")}
        parts.append({s[i]["id"]: split for split, s in sources.items() for i in range(len(s))})
        scenes = [{int(name[:2]) // 2 for name, part in parts[-1].items() if part == split} for split in sources]
        assert sum(map(len, scenes)) == count // 2
    assert len(parts[1]) == 20
    assert all(parts[1][name] == part for name, part in parts[0].items())


def test_every_split_asked_for_gets_an_item_however_few_there_are(tmp_path, media):
    captions = write_jsonl(tmp_path / "c.jsonl", [{"image": f"0{i}.png", "caption": "c"} for i in range(3)])
    prepared(tmp_path, media, captions, validation=0.01, test=0.01)
    assert [len(records(tmp_path, split)) for split in ("train", "validation", "test")] == [1, 1, 1]
    captions = write_jsonl(tmp_path / "c.jsonl", [{"image": "00.png", "caption": "c"}])
    with pytest.raises(ValueError, match="cannot fill train, validation, test"):
        prepare(NAME, tmp_path / "again", captions=[captions], media=str(media))


def test_contradicting_sources_of_splits_are_errors(tmp_path, media):
    rows = [{"image": "00.png", "caption": "c", "split": "train"}, {"image": "01.png", "caption": "c"}]
    with pytest.raises(ValueError, match="give all rows a split or none"):
        prepared(tmp_path, media, write_jsonl(tmp_path / "c.jsonl", rows))
    with pytest.raises(ValueError, match="drop --validation"):
        prepared(tmp_path, media, write_jsonl(tmp_path / "c.jsonl", rows[:1]), validation=0.1)


# ---- bad input ----


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "00.png", "caption": "  "}, "empty caption"),
        ({"image": "00.png", "captions": []}, "no caption"),
        ({"image": "00.png", "caption": 3}, "caption is no text but int"),
        ({"image": "00.png", "caption": "a\0b"}, "NUL"),
        ({"image": "00.png", "text": "c"}, "no 'caption' or 'captions' among: image, text"),
        ({"picture": "00.png", "caption": "c"}, "no 'image' or 'video' or 'media' among: picture, caption"),
        ({"image": "00.png", "video": "00.png", "caption": "c"}, "both 'image' and 'video'"),
        ({"image": "gone.png", "caption": "c"}, "no file 'gone.png'"),
        ({"image": "../secret.png", "caption": "c"}, "leads out of the media folder"),
        ({"image": "x" * 5000, "caption": "c"}, "name too long"),
        ({"image": "/secret.png", "caption": "c"}, "leads out of the media folder"),
        ({"image": "00.png", "caption": "c", "split": "a b"}, "is no name"),
        (["00.png", "c"], "a JSON array, not an object"),
        (b'{"image": "00.png", ', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b'{"image": "00.png", "caption": "\xff"}', "not UTF-8"),
        (b'{"image": "00.png", "caption": "\\ud800"}', "caption is not UTF-8"),
        ({"video": "00.png", "caption": "c"}, "no video file of a known kind"),
    ],
)
def test_unusable_rows_stop_with_their_line_and_reason(tmp_path, media, row, reason):
    write_image(tmp_path / "secret.png")
    [(line, found)] = problems(tmp_path, media, [b"", row])
    assert line == 2
    assert reason in found


def test_a_whole_path_outside_the_media_folder_is_refused(tmp_path, media):
    write_image(tmp_path / "media2" / "secret.png")
    for name in (tmp_path / "media2" / "secret.png", media / ".." / "media2" / "secret.png"):
        [(_, reason)] = problems(tmp_path, media, [{"image": str(name), "caption": "c"}])
        assert reason == f"{str(name)!r} leads out of the media folder {media}"


def test_files_that_do_not_decode_are_named(tmp_path, media):
    whole = (media / "01.png").read_bytes()
    (media / "00.png").write_bytes(b"no image")
    (media / "01.png").write_bytes(whole[: len(whole) // 2])
    write_sound(media / "sound.mp4")
    write_video(media / "clip.mp4")
    rows = [{"image": "00.png"}, {"image": "01.png"}, {"video": "sound.mp4"}, {"image": "clip.mp4"}]
    found = problems(tmp_path, media, [{**row, "caption": "c"} for row in rows])
    assert [line for line, _ in found] == [1, 2, 3, 4]
    for (_, reason), part in zip(
        found, ("00.png: cannot decode", "01.png: cannot decode", "no video stream", "a video in"), strict=True
    ):
        assert part in reason


def test_ids_and_rows_that_contradict_each_other(tmp_path, media):
    rows = [
        {"image": "00.png", "caption": "a", "id": "x"},
        {"image": "01.png", "caption": "b", "id": "x"},
        {"image": "00.png", "caption": "c", "id": "y"},
    ]
    found = problems(tmp_path, media, rows)
    assert [line for line, _ in found] == [2, 3]
    assert "id 'x' is taken by 00.png" in found[0][1] and "line 1" in found[0][1]
    assert "00.png has id 'y' here and 'x'" in found[1][1]


def test_skip_broken_writes_the_others_and_lists_what_is_left_out(tmp_path, media):
    captions = write_jsonl(tmp_path / "c.jsonl", [{"image": "00.png", "caption": "c"}, {"image": "x", "caption": "c"}])
    assert [r["id"] for r in prepared(tmp_path, media, captions, skip_broken=True)] == ["00.png"]
    [line] = (tmp_path / "out" / NAME / LEFT_OUT_FILE).read_text().splitlines()
    assert json.loads(line)["line"] == 2
    captions = write_jsonl(tmp_path / "c.jsonl", [{"image": "x", "caption": "c"}])
    with pytest.raises(BrokenRecordsError, match="none is left"):
        prepare(NAME, tmp_path / "again", captions=[captions], media=str(media), skip_broken=True)


@pytest.mark.parametrize("row", [{"image": "gone.png", "caption": "c"}, {"image": "00.png", "caption": "c"}])
def test_a_split_of_which_nothing_is_left_is_an_error(tmp_path, media, row):
    (media / "00.png").write_bytes(b"no image")
    good = write_jsonl(tmp_path / "good.jsonl", [{"image": "01.png", "caption": "c"}])
    bad = write_jsonl(tmp_path / "bad.jsonl", [row])
    with pytest.raises(BrokenRecordsError, match="1 of 2 records cannot be used; nothing is left of split validation"):
        prepared(tmp_path, media, [f"train={good}", f"val={bad}"], validation=None, test=None, skip_broken=True)
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="the captions of split test name no file"):
        prepared(tmp_path, media, [f"train={good}", f"test={empty}"], validation=None, test=None)


def test_tables_report_missing_columns_bad_bytes_and_torn_rows(tmp_path, media):
    path = tmp_path / "captions.csv"
    path.write_text("file,caption\n00.png,c\n")
    with pytest.raises(ValueError, match=r"no column 'image' or 'video' or 'media'; columns found: 'file', 'caption'"):
        prepared(tmp_path, media, str(path))
    path.write_text("image,caption," + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match="malformed first line"):
        prepared(tmp_path, media, str(path))
    path.write_bytes(b"image,caption\n00.png,c\n01.png,\xff\n02.png,left, then up\n03.png\n04.png,\n")
    with pytest.raises(BrokenRecordsError) as error:
        prepared(tmp_path, media, str(path))
    found = [(problem.place.line, problem.reason) for problem in error.value.problems]
    assert [line for line, _ in found] == [3, 4, 5, 6]
    parts = ("caption is not UTF-8", "1 more fields than columns", "no 'caption'", "empty caption")
    assert all(part in reason for (_, reason), part in zip(found, parts, strict=True))


def test_missing_places_and_wrong_options_name_what_to_give(tmp_path, media):
    captions = write_jsonl(tmp_path / "c.jsonl", [{"image": "00.png", "caption": "c"}])
    for options, kind, message in [
        ({}, ValueError, "--captions"),
        ({"captions": [captions]}, ValueError, "--media"),
        ({"captions": [captions], "media": str(tmp_path / "gone")}, FileNotFoundError, "media folder"),
        ({"captions": [str(tmp_path / "gone.csv")], "media": str(media)}, FileNotFoundError, "no caption file"),
        ({"captions": [captions], "media": str(media), "format": "xml"}, ValueError, "choose one of"),
        ({"captions": [captions], "media": str(media), "test": 1.5}, ValueError, "below 1"),
        ({"captions": [captions], "media": str(media), "test": 0.99}, ValueError, "nothing to train on"),
        ({"captions": [captions], "media": str(media), "workers": 0}, ValueError, "at least 1"),
        ({"captions": [captions], "media": str(media), "split_by": "scene"}, BrokenRecordsError, "cannot be used"),
    ]:
        with pytest.raises(kind, match=message):
            prepare(NAME, tmp_path / "out", **options)
    (media / "00.txt").write_text("c")
    for given in (media, media / "*.txt"):
        with pytest.raises((ValueError, FileNotFoundError), match="give the folder as --media, without --captions"):
            prepared(tmp_path, media, str(given))
    (tmp_path / "captions.xml").write_text("<a/>")
    with pytest.raises(ValueError, match="unknown format"):
        prepared(tmp_path, media, str(tmp_path / "captions.xml"))
