"""Public data sets in miniature: invented content in the owners' formats, and the same as ViLT's arrow files.

Every tree has text that is not ASCII, a portrait picture or, for videos, a clip of one frame, and several texts an item
where the data set has them.
"""

from __future__ import annotations

import io
import json
import zlib
from functools import cache
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
from PIL import Image

from scl_jax.data.builders import open_source

CAPTIONS = (["a cat asleep", "eine Katze schläft", "猫"], ["a red bus"], ["two dogs", "dogs & a “ball”"])
SIZES = ((32, 24), (20, 32), (32, 32))  # width, height: the second is a portrait


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZES[number % 3], (60 * number % 250, 90, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", SIZES[number % 3], (40 * number % 250, 9, 100)).save(buffer, "PNG")
    return buffer.getvalue()


@cache  # the encoder need not write the same bytes twice
def clip(number: int) -> bytes:
    """Clip 1 has a single frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in range(1 if number == 1 else 4):
            pixels = np.full((32, 32, 3), 30 * frame + number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def put(file: Path, content: bytes | str | list | dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def arrow(file: Path, **columns: list) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# ---- images with captions ----


def coco(tree: Path, arrows: Path) -> None:
    images = []
    for number, (split, part) in enumerate((("train", "train2014"), ("restval", "val2014"), ("val", "val2014"))):
        images.append(karpathy_entry(number, f"COCO_{part}_{number:012d}.jpg", split) | {"filepath": part})
    images.append(karpathy_entry(3, f"COCO_val2014_{3:012d}.jpg", "test") | {"filepath": "val2014"})
    put(tree / "dataset_coco.json", {"images": images, "dataset": "coco"})
    for number, image in enumerate(images):
        put(tree / image["filepath"] / image["filename"], jpeg(number))
        write_captions(arrows / f"coco_caption_karpathy_{image['split']}.arrow", [number], [image["filename"]])


def flickr30k(tree: Path, arrows: Path) -> None:
    images = [karpathy_entry(n, f"{1000 + n}.jpg", split) for n, split in enumerate(("train", "val", "test"))]
    put(tree / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    for number, image in enumerate(images):
        put(tree / "flickr30k-images" / image["filename"], jpeg(number))
        write_captions(arrows / f"f30k_caption_karpathy_{image['split']}.arrow", [number], [image["filename"]])


def karpathy_entry(number: int, filename: str, split: str) -> dict:
    sentences = [{"raw": text, "tokens": text.split(), "sentid": 9} for text in CAPTIONS[number % 3]]
    return {"filename": filename, "imgid": number, "split": split, "sentences": sentences}


def write_captions(file: Path, numbers: list[int], names: list[str], column: str = "image", make=jpeg) -> None:
    captions = [CAPTIONS[number % 3] for number in numbers]
    arrow(file, **{column: [make(number) for number in numbers]}, caption=captions, image_id=names)


def visual_genome(tree: Path, arrows: Path) -> None:
    entries = []
    for number in range(3):
        regions = [{"region_id": 7, "image_id": number, "phrase": text, "x": 0} for text in CAPTIONS[number]]
        entries.append({"id": number, "regions": regions})
        put(tree / ("VG_100K" if number else "VG_100K_2") / f"{number}.jpg", jpeg(number))
    put(tree / "region_descriptions.json", entries)
    write_captions(arrows / "vg.arrow", [0, 1, 2], ["0", "1", "2"])


def sbu(tree: Path, arrows: Path) -> None:
    names = [f"438505896{number}_b0.jpg" for number in range(3)]
    captions = [CAPTIONS[number][-1] for number in range(3)]
    put(tree / "SBU_captioned_photo_dataset_urls.txt", "".join(f"http://photos/1/{name}\n" for name in names))
    put(tree / "SBU_captioned_photo_dataset_captions.txt", "\n".join(captions) + "\n")
    for number, name in enumerate(names):
        put(tree / "images" / f"{number}" / name, jpeg(number))
        arrow(arrows / f"sbu_{number}.arrow", image=[jpeg(number)], caption=[[captions[number]]], image_id=[name])


def conceptual_captions(tree: Path, arrows: Path) -> None:
    for split, table, folder in (
        ("train", "Train_GCC-training.tsv", "training"),
        ("val", "Validation_GCC-1.1.0-Validation.tsv", "validation"),
    ):
        urls = [f"http://pictures/{split}/{number}" for number in range(3)]
        rows = [f'{CAPTIONS[number][-1]} "so"\t{url}' for number, url in enumerate(urls)]
        rows[2] += "\tmine/two.jpg"
        put(tree / table, "\n".join(rows) + "\n")
        numbered = f"{1:09d}.jpg"
        names = [
            f"0_{zlib.crc32(urls[0].encode())}",
            numbered if split == "val" else f"00000/{numbered}",
            "mine/two.jpg",
        ]
        for number, name in enumerate(names):
            put(tree / folder / name, jpeg(number))
        texts = [[row.split("\t")[0]] for row in rows]
        ids = [f"{folder}/{number:09d}" for number in range(3)]
        arrow(
            arrows / f"conceptual_caption_{split}_0.arrow",
            image=[jpeg(number) for number in range(3)], caption=texts, image_id=ids,
        )  # fmt: skip


# ---- clips with captions ----


def webvid(tree: Path, arrows: Path) -> None:
    for split in ("train", "val"):
        rows = ["videoid,contentUrl,duration,page_dir,name"]
        for number in range(2):
            rows.append(f'{number},http://clips/{number},PT9S,{number}_0,"{CAPTIONS[number][-1]}, later"')
            put(tree / f"videos/{number}_0/{number}.mp4", clip(number))
        put(tree / f"results_2M_{split}.csv", "\n".join(rows) + "\n")
        captions = [[f"{CAPTIONS[number][-1]}, later"] for number in range(2)]
        arrow(arrows / f"webvid_{split}.arrow", video=[clip(0), clip(1)], caption=captions, image_id=["0", "1"])


def msrvtt(tree: Path, arrows: Path) -> None:
    sentences = [
        {"caption": text, "video_id": f"video{number}", "sen_id": 1} for number in (0, 1) for text in CAPTIONS[number]
    ]
    put(tree / "MSRVTT_data.json", {"videos": [], "sentences": [*sentences, {"caption": "b", "video_id": "video2"}]})
    put(tree / "MSRVTT_train.9k.csv", "video_id\nvideo0\nvideo1\n")
    put(tree / "MSRVTT_JSFUSION_test.csv", 'key,vid_key,video_id,sentence\nret0,msr2,video2,"a cat, über all"\n')
    for number in range(3):
        put(tree / f"videos/all/video{number}.mp4", clip(number))
    write_captions(arrows / "msrvtt_train.arrow", [0, 1], ["video0", "video1"], "video", clip)
    arrow(arrows / "msrvtt_test.arrow", video=[clip(2)], caption=[["a cat, über all"]], image_id=["video2"])


def lsmdc(tree: Path, arrows: Path) -> None:
    for split, table in (
        ("train", "LSMDC16_annos_training.csv"),
        ("val", "LSMDC16_annos_val.csv"),
        ("test", "LSMDC16_challenge_1000_publictect.csv"),
    ):
        names = [f"0001_{split}_Film_00.00.5{number}.926-00.00.54.129" for number in range(2)]
        sentences = ['SOMEONE says "hello', "SOMEONE geht über die Straße."]
        rows = ["\t".join((name, *("00.00.51.926",) * 4, text)) for name, text in zip(names, sentences, strict=True)]
        put(tree / table, "\n".join(rows) + "\n")
        put(tree / f"videos/0001_{split}_Film/{names[0]}.avi", clip(0))
        put(tree / f"videos/{names[1]}.mp4", clip(1))
        captions = [[text] for text in sentences]
        arrow(arrows / f"lsmdc_{split}.arrow", video=[clip(0), clip(1)], caption=captions, image_id=names)


# ---- tasks ----

# question id, image, question, ten answers; "cat", "2" and "yes" are the most common ones of enough questions
QUESTIONS = {
    "train2014": [
        (10, 1, "what is it?", ["cat"] * 9 + ["a dog"]),
        (11, 1, "wie viele Bäume?", ["two"] * 2 + ["2"] * 5 + ["cat"] * 3),
        (20, 2, "is it red?", ["Yes."] * 10),
        (21, 2, "what kind?", ["tabby"] * 10),  # outside the vocabulary
    ],
    "val2014": [
        (30, 8, "is it?", ["yes"] * 10),
        (40, 4, "what?", ["the cat"] * 3 + ["horse"] * 7),
        (41, 4, "how many?", ["2"] * 10),
    ],
}
CLASSES = ["cat", "2", "yes"]  # with AT_LEAST = 1 but for "tabby" and "horse"


def vqav2(tree: Path, arrows: Path) -> None:
    for part, questions in QUESTIONS.items():
        entries = [{"question_id": n, "image_id": image, "question": text} for n, image, text, _ in questions]
        annotations = [
            {
                "question_id": n,
                "image_id": image,
                "multiple_choice_answer": answers[0] if answers[0] not in ("tabby", "the cat") else "cat",
                "answers": [{"answer": answer, "answer_id": k} for k, answer in enumerate(answers)],
            }
            for n, image, _, answers in questions
        ]
        put(tree / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": entries})
        put(tree / f"v2_mscoco_{part}_annotations.json", {"annotations": annotations})
        for image in {image for _, image, _, _ in questions}:
            put(tree / part / f"COCO_{part}_{image:012d}.jpg", jpeg(image))
    for part in ("test2015", "test-dev2015"):
        entries = [{"question_id": 50, "image_id": 5, "question": "where?"}]
        put(tree / f"v2_OpenEnded_mscoco_{part}_questions.json", {"questions": entries})
    put(tree / "test2015" / f"COCO_test2015_{5:012d}.jpg", jpeg(5))

    def row(image: int, *questions: tuple[int, str, dict[int, float]]) -> dict[str, list]:
        return {
            "image": [jpeg(image)],
            "questions": [[text for _, text, _ in questions]],
            "answers": [[[CLASSES[label] for label in scores] for _, _, scores in questions]],
            "answer_labels": [[list(scores) for _, _, scores in questions]],
            "answer_scores": [[list(scores.values()) for _, _, scores in questions]],
            "image_id": [image],
            "question_id": [[number for number, _, _ in questions]],
        }

    first = row(1, (10, "what is it?", {0: 1.0}), (11, "wie viele Bäume?", {1: 1.0, 0: 0.9}))
    second = row(2, (20, "is it red?", {2: 1.0}))
    arrow(arrows / "vqav2_train.arrow", **{key: first[key] + second[key] for key in first})
    arrow(arrows / "vqav2_trainable_val.arrow", **row(4, (40, "what?", {0: 0.9}), (41, "how many?", {1: 1.0})))
    arrow(arrows / "vqav2_rest_val.arrow", **row(8, (30, "is it?", {2: 1.0})))
    for part in ("test", "test-dev"):
        arrow(arrows / f"vqav2_{part}.arrow", **row(5, (50, "where?", {})))


def nlvr2(tree: Path, arrows: Path) -> None:
    for split in ("train", "dev", "test1"):
        rows, columns = [], {name: [] for name in ("image_0", "image_1", "questions", "answers", "identifier")}
        for number in range(2):
            pair = f"{split}-7-{number}"
            texts = CAPTIONS[number]
            for place, text in enumerate(texts):
                label = str(place % 2 == 0)
                rows.append({"sentence": text, "identifier": f"{pair}-{place}", "label": label, "directory": 3})
            folder = tree / ("images/train/3" if split == "train" else split)
            put(folder / f"{pair}-img0.png", png(number))
            put(folder / f"{pair}-img1.png", png(number + 5))
            labels = [str(place % 2 == 0) for place in range(len(texts))]
            for name, entry in zip(columns, (png(number), png(number + 5), texts, labels, pair), strict=True):
                columns[name].append(entry)
        put(tree / f"data/{split}.json", lines(rows))
        arrow(arrows / f"nlvr2_{split}.arrow", **columns)


def snli_ve(tree: Path, arrows: Path) -> None:
    labels = ("contradiction", "neutral", "entailment")
    for split in ("train", "dev", "test"):
        rows = []
        for number, name in enumerate(("4705552913", "2000")):
            put(tree / f"flickr30k-images/{name}.jpg", jpeg(number))
            rows += [
                {
                    "Flickr30K_ID": name,
                    "pairID": f"{name}.jpg#{place}r1n",
                    "sentence1": "a premise",
                    "sentence2": text,
                    "gold_label": labels[(number + place) % 3],
                }
                for place, text in enumerate(CAPTIONS[number])
            ]
        put(tree / f"snli_ve_{split}.jsonl", lines(rows))
        arrow(
            arrows / f"snli_{split}.arrow",
            image=[jpeg(0), jpeg(1)],
            sentences=[[["a premise", text] for text in CAPTIONS[number]] for number in range(2)],
            labels=[[(number + place) % 3 for place in range(len(CAPTIONS[number]))] for number in range(2)],
        )


TREES = {
    "coco/captions": coco,
    "flickr30k/captions": flickr30k,
    "visual_genome/captions": visual_genome,
    "sbu/captions": sbu,
    "conceptual_captions/captions": conceptual_captions,
    "webvid/captions": webvid,
    "msrvtt/captions": msrvtt,
    "lsmdc/captions": lsmdc,
    "vqav2/questions": vqav2,
    "nlvr2/statements": nlvr2,
    "snli_ve/pairs": snli_ve,
}


def records(name, split, folder):
    """All examples of a prepared split."""
    source = open_source(name, split, folder)
    return [source[index] for index in range(len(source))]
