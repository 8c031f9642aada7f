"""What is true of every scene, clip and caption of the toy world."""

from __future__ import annotations

import io
import pickle
import re

import av
import numpy as np
import pytest
from PIL import Image

from scl_jax.data.builders import open_source, prepare, toy_scenes, toy_world

SYNONYMS = {"to the left of": "left of", "to the right of": "right of", "over": "above", "under": "below"}
SYNONYMS |= {"larger than": "bigger than", "goes": "moves", "does not move": "stays still"}
SYNONYMS |= {"gets bigger": "grows", "gets smaller": "shrinks"}
PLACE = "left of|right of|above|below"
RELATION = rf"(?:above|below) and (?:left|right) of|{PLACE}|bigger than|smaller than"
DIRECTION = "left|right|up|down"


@pytest.fixture(scope="module", params=["images", "videos"])
def config_name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def train(config_name) -> list[dict]:
    return list(toy_world.records(config_name, "train", {"images": 300, "videos": 60}[config_name], seed=0))


@pytest.fixture(scope="module")
def test(config_name) -> list[dict]:
    return list(toy_world.records(config_name, "test", {"images": 200, "videos": 60}[config_name], seed=0))


def pairs_of(record: dict) -> set[tuple[str, str]]:
    return {(list(toy_scenes.COLOURS)[colour], toy_scenes.SHAPES[shape]) for colour, shape, _ in record["things"]}


def pixels_of(record: dict) -> np.ndarray:
    if record["boxes"].shape[0] == len(record["things"]):
        return np.asarray(Image.open(io.BytesIO(record["media"])))[None]
    with av.open(io.BytesIO(record["media"])) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def skeletons(record: dict) -> list[str]:
    """The captions with `<k>` for a noun phrase that names object k, and one wording for each meaning."""
    texts = list(record["captions"])
    for caption, start, end, thing in sorted(record["phrases"].tolist(), reverse=True):
        texts[caption] = f"{texts[caption][:start]}<{thing}>{texts[caption][end:]}"
    for rare, usual in SYNONYMS.items():
        texts = [re.sub(rf"\b{rare}\b", usual, text) for text in texts]
    return texts


def middles(record: dict) -> np.ndarray:
    """Centres of the boxes, (F, K, 2)."""
    boxes = record["boxes"].reshape(-1, len(record["things"]), 4)
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def test_records_depend_on_seed_split_and_index_only(config_name, train):
    again = list(toy_world.records(config_name, "train", 10, seed=0))
    for one, other in zip(train, again, strict=False):
        assert one["media"] == other["media"] and one["captions"] == other["captions"]
    for other in (
        toy_world.records(config_name, "train", 1, seed=1),
        toy_world.records(config_name, "test", 1, seed=0),
    ):
        assert next(other)["media"] != train[0]["media"]


def test_held_out_pairs_are_never_trained_on_and_always_tested(train, test):
    held_out = set(toy_scenes.HELD_OUT)
    assert len(held_out) == len({c for c, _ in held_out}) == len({s for _, s in held_out}) == 8
    assert not any(pairs_of(record) & held_out for record in train)
    assert all(pairs_of(record) & held_out for record in test)


def test_no_evaluation_scene_contains_the_objects_of_another(test):
    contents = [pairs_of(record) for record in test]
    assert not any(a <= b for i, a in enumerate(contents) for j, b in enumerate(contents) if i != j)


def test_captions_are_short_distinct_and_name_every_object(train, test):
    for record in train + test:
        assert len(set(record["captions"])) == len(record["captions"]) in (2, 3)
        assert max(len(caption.split()) for caption in record["captions"]) <= 30
        things = set(range(len(record["things"])))
        for number in range(len(record["captions"])):
            assert {phrase.thing for phrase in toy_world.phrases(record) if phrase.caption == number} == things
    assert {len(record["captions"]) for record in train} == {3}


def test_objects_of_stills_lie_in_the_middles_of_cells():
    scenes = toy_world.records("images", "train", 300, seed=0)
    centres = np.concatenate([middles(record)[0] for record in scenes])
    cells = np.floor(centres / toy_scenes.CELL)
    assert np.abs(centres - (cells + 0.5) * toy_scenes.CELL).max() <= 2  # boxes of uneven shapes are not quite centred
    assert len(np.unique(cells, axis=0)) == 16


def test_noun_phrases_name_their_object_truly(train, test):
    for record in train + test:
        for phrase in toy_world.phrases(record):
            colour, shape, _ = record["things"][phrase.thing].tolist()
            assert phrase.text.endswith(f" {list(toy_scenes.COLOURS)[colour]} {toy_scenes.SHAPES[shape]}")
            heights = phrase.boxes[:, 3] - phrase.boxes[:, 1]
            if re.search("small|little", phrase.text):
                assert heights.max() < 20
            if re.search("big|large", phrase.text):
                assert heights.min() > 20


def test_image_captions_are_true():
    related = 0
    for split in ("train", "test"):
        for record in toy_world.records("images", split, 300, seed=3):
            for text in skeletons(record):
                for one, relation, other in image_statements(text, len(record["things"])):
                    assert holds(record, one, relation, other), (text, record["captions"])
                    related += 1
    assert related > 1000


def image_statements(text: str, count: int) -> list[tuple[int, str, int]]:
    """The relations that an image caption states; an AssertionError where it is none of the grammar's forms."""
    listing = re.fullmatch(
        r"(?:there is (?:only )?|only |just |nothing but |(?:there are )?(\w+) (?:shapes|objects): )?"
        r"<\d>(?:(?:, <\d>)* and <\d>)?",
        text,
    )
    if listing:
        assert listing[1] in (None, ["one", "two", "three", "four"][count - 1])
        return []
    stated = []
    for clause in text.split(", and "):
        match = re.fullmatch(rf"<(\d)> is ({RELATION}) <(\d)>(?: and ({RELATION}) <(\d)>)?", clause)
        assert match, text
        stated.append((int(match[1]), match[2], int(match[3])))
        if match[4]:
            stated.append((int(match[1]), match[4], int(match[5])))
    return stated


def holds(record: dict, one: int, relation: str, other: int) -> bool:
    x, y = middles(record)[0, one] - middles(record)[0, other]
    sizes = record["things"][:, 2]
    truth = {"left": x < -8, "right": x > 8, "above": y < -8, "below": y > 8}  # the box of a shape is off centre by < 3
    truth |= {"bigger": sizes[one] > sizes[other], "smaller": sizes[one] < sizes[other]}
    return all(truth[word] for word in relation.split() if word in truth)


def test_clip_captions_are_true_and_no_single_frame_tells():
    for split in ("train", "test"):
        for record in toy_world.records("videos", split, 60, seed=3):
            for text in skeletons(record):
                stated = clip_statements(text)
                assert set(stated) == set(range(len(record["things"])))
                assert any(motion != "stays still" for motion in stated.values())
                for thing, motion in stated.items():
                    assert motion == motion_seen(record, thing), (text, record["captions"])


def clip_statements(text: str) -> dict[int, str]:
    """What a clip caption states of every object: "left up", "grows", "stays still"."""
    motion = rf"(?:first )?moves (?:{DIRECTION})(?:(?:, then| and then) (?:{DIRECTION}))?|grows|shrinks|stays still"
    clause = rf"<\d> (?:{motion})"
    assert re.fullmatch(rf"{clause}(?:(?:,| and| while| as) {clause}){{0,2}}", text), text
    stated = {}
    for thing, found in re.findall(rf"<(\d)> ({motion})", text):
        stated[int(thing)] = " ".join(re.findall(DIRECTION, found)) if "moves" in found else found
    return stated


def motion_seen(record: dict, thing: int) -> str:
    boxes = record["boxes"].reshape(-1, len(record["things"]), 4)[:, thing]
    width = boxes[:, 2] - boxes[:, 0]
    if width[-1] != width[0]:
        assert (np.diff(width) * np.sign(width[-1] - width[0]) >= 0).all()
        return "grows" if width[-1] > width[0] else "shrinks"
    seen: list[str] = []
    for x, y in np.diff(middles(record)[:, thing], axis=0):
        assert x == 0 or y == 0
        step = {(-1, 0): "left", (1, 0): "right", (0, -1): "up", (0, 1): "down"}.get((np.sign(x), np.sign(y)))
        if step and step != (seen or [None])[-1]:
            seen.append(step)
    return " ".join(seen) or "stays still"


def test_masks_fit_the_boxes_and_the_colours_of_the_decoded_media(train, test):
    for record in (train + test)[::5]:
        pixels = pixels_of(record)
        assert pixels[:, 0].min() > 200  # the upper edge is background, plain and light
        for phrase in {phrase.thing: phrase for phrase in toy_world.phrases(record)}.values():
            assert phrase.masks.shape == pixels.shape[:3]
            colour = np.asarray(list(toy_scenes.COLOURS.values())[record["things"][phrase.thing][0]])
            for frame, (x0, y0, x1, y1) in enumerate(phrase.boxes.tolist()):
                rows, columns = np.nonzero(phrase.masks[frame])
                assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (x0, y0, x1, y1)
                assert min(x0, y0) >= 3 and max(x1, y1) <= 93
                assert np.abs(np.median(pixels[frame][phrase.masks[frame]], axis=0) - colour).max() < 25


def test_clips_have_8_to_16_frames_and_images_one(config_name, train):
    frames = {len(pixels_of(record)) for record in train}
    assert frames == {1} if config_name == "images" else frames <= set(range(8, 17)) and len(frames) > 4
    assert pixels_of(train[0]).shape[1:] == (96, 96, 3)


def test_more_scenes_than_can_be_told_apart_are_an_error(monkeypatch):
    monkeypatch.setattr(toy_world, "_MAX_ATTEMPTS", 1)
    with pytest.raises(ValueError, match="cannot tell 500 scenes of test apart; ask for fewer"):
        list(toy_world.records("images", "test", 500, seed=0))


def test_prepared_shards_give_the_records_back(tmp_path, config_name, test):
    name = f"toy_world/{config_name}"
    prepare(name, tmp_path, train=3, validation=4, test=5)
    assert [len(open_source(name, split, tmp_path)) for split in ("train", "validation", "test")] == [3, 4, 5]
    source = pickle.loads(pickle.dumps(open_source(name, "test", tmp_path)))  # noqa: S301  (bytes of our own)
    for index in range(5):
        for key, value in test[index].items():
            np.testing.assert_array_equal(source[index][key], value)
    assert all(isinstance(caption, str) for caption in source[0]["captions"])
    assert [p.text for p in toy_world.phrases(source[2])] == [p.text for p in toy_world.phrases(test[2])]


def test_a_data_set_is_not_silently_reused_under_other_options(tmp_path):
    options = {"train": 2, "validation": 2, "test": 2}
    folder = prepare("toy_world/images", tmp_path, **options)
    written = folder.stat().st_mtime_ns
    assert prepare("toy_world/images", tmp_path, **options).stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="was prepared with other options"):
        prepare("toy_world/images", tmp_path, **options | {"train": 4})
    prepare("toy_world/images", tmp_path, overwrite=True, **options | {"train": 4})
    assert len(open_source("toy_world/images", "train", tmp_path)) == 4


def test_errors_say_what_to_do(tmp_path):
    command = re.escape(f"python -m scl_jax.data.prepare --dataset=toy_world/images --out={tmp_path}")
    with pytest.raises(FileNotFoundError, match=command):
        open_source("toy_world/images", "train", tmp_path)
    folder = prepare("toy_world/images", tmp_path, train=1, validation=1, test=1)
    options = "evaluate.split and evaluate.final_split name the splits that a run evaluates"
    with pytest.raises(ValueError, match=f"has no split 'dev'; it has 'train', 'validation', 'test'; {options}"):
        open_source("toy_world/images", "dev", tmp_path)
    next(folder.glob("*train*")).unlink()
    with pytest.raises(FileNotFoundError, match=command):
        open_source("toy_world/images", "train", tmp_path)
    with pytest.raises(ValueError, match="no builder 'toy_word' in .*; known: .*toy_world"):
        prepare("toy_word/images", tmp_path)
    with pytest.raises(ValueError, match="expected '<builder>/<config>'"):
        prepare("toy_world", tmp_path)
    with pytest.raises(ValueError, match="'own_data/my set': .* a name is of letters, digits, '_', '-' and '.'"):
        prepare("own_data/my set", tmp_path)
    several = "several in a config are written \"--config.data.images.datasets=('own_data/a','toy_world/images')\""
    with pytest.raises(ValueError, match=re.escape(several)):
        open_source("own_data/a,toy_world/images", "train", tmp_path)
    with pytest.raises(ValueError, match="configs 'images', 'videos', .*, not 'sounds'"):
        prepare("toy_world/sounds", tmp_path)
    with pytest.raises(ValueError, match="train=0; a split needs at least one record"):
        prepare("toy_world/images", tmp_path, train=0)
