"""Whole files of every kind that is read, for fuzz.py, which runs this file, to mutate."""

from __future__ import annotations

import collections
import csv
import io
import json
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import tiny_model
import torch
from PIL import Image
from safetensors.torch import load_file

from scl_jax.convert.to_torch import to_torch
from scl_jax.data.builders import prepare
from scl_jax.data.tokens import train_tokenizer

TEXTS = (
    "a red star to the left of two small blue rings, it's above them.",
    "it moves left,\tthen up … and \x00 stops",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 ﷽ \u202eright to left\u202c قطة على اليمين  מימין לשמאל 猫 <mask> </s> <pad>",
    "word " * 300,
    "x" * 3000,
    "ab\n" * 50 + "!?…«»" * 40,
)


def pictures() -> dict[str, bytes]:
    """By name: every format and kind that images.py says it reads."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    rgb = coarse.resize((48, 36), Image.Resampling.BICUBIC)
    rgba, grey = rgb.convert("RGBA"), rgb.convert("L")
    sixteen = Image.fromarray(rng.integers(0, 65536, (24, 24), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    animated = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]}
    kinds = [
        ("jpeg", rgb, "JPEG", {}),
        ("jpeg.progressive", rgb, "JPEG", {"progressive": True}),
        ("jpeg.grey", grey, "JPEG", {}),
        ("jpeg.cmyk", rgb.convert("CMYK"), "JPEG", {}),
        ("jpeg.turned", rgb, "JPEG", {"exif": exif}),
        ("png", rgb, "PNG", {}),
        ("png.alpha", rgba, "PNG", {}),
        ("png.palette", rgb.quantize(16), "PNG", {"transparency": 3}),
        ("png.16", sixteen, "PNG", {}),
        ("png.animated", rgb, "PNG", animated),
        ("webp", rgb, "WEBP", {}),
        ("webp.lossless", rgba, "WEBP", {"lossless": True}),
        ("webp.animated", rgb, "WEBP", animated),
        ("gif", rgb, "GIF", {}),
        ("gif.animated", rgb, "GIF", animated),
        ("bmp", rgb, "BMP", {}),
        ("bmp.palette", rgb.quantize(16), "BMP", {}),
        ("tiff", rgb, "TIFF", {}),
        ("tiff.lzw", rgb, "TIFF", {"compression": "tiff_lzw"}),
        ("tiff.deflate", rgba, "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("tiff.jpeg", rgb, "TIFF", {"compression": "jpeg"}),
        ("ppm", rgb, "PPM", {}),
        ("avif", rgb, "AVIF", {}),
        ("jpeg2000", rgb, "JPEG2000", {}),
        ("tga", rgb, "TGA", {"compression": "tga_rle"}),
    ]
    made = {}
    for name, image, form, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        made[name] = buffer.getvalue()
    return made


def clip(container: str, codec: str, options: dict[str, str] | None = None) -> bytes:
    """Ten frames of 32x32."""
    rng = np.random.default_rng(0)
    file = Path(tempfile.mkdtemp()) / "clip"  # what moves the index to the front reads the file again
    with av.open(str(file), "w", format=container, options=options or {}) as out:
        stream = out.add_stream(codec, rate=8)
        stream.width, stream.height, stream.gop_size = 32, 32, 4
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for k in range(10):
            picture = (20 * k + rng.integers(-9, 9, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    data = file.read_bytes()
    shutil.rmtree(file.parent)
    return data


def clips() -> dict[str, bytes]:
    """By name: containers and codecs of the web."""
    return {
        "mp4.h264": clip("mp4", "libx264"),
        "mp4.front": clip("mp4", "libx264", {"movflags": "faststart"}),
        "mp4.fragments": clip("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
        "webm.vp9": clip("webm", "libvpx-vp9"),
        "webm.vp8": clip("webm", "libvpx"),
        "mkv.mjpeg": clip("matroska", "mjpeg"),
        "avi.mpeg4": clip("avi", "mpeg4"),
        "ts.h264": clip("mpegts", "libx264"),
    }


def captions(media: Path) -> dict[str, bytes]:
    """By suffix: caption files about the media folder, which is filled."""
    names = ["a.png", "b.png", "dir/c.png", "ünïcode 猫.png"]
    for name in names:
        (media / name).parent.mkdir(parents=True, exist_ok=True)
        (media / name).write_bytes(tiny_model.png())
    rows = [
        {"image": names[0], "caption": TEXTS[0], "id": "1", "split": "train"},
        {"image": names[1], "captions": [TEXTS[0], TEXTS[2]], "id": "2", "split": "val"},
        {"media": names[2], "caption": 'say "a, b"', "scene": 4},
        {"image": names[3], "caption": "line\nbreak"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + json.dumps(rows[3], ensure_ascii=False) + "\n"
    nlvr = {"sentence": "a cat", "label": "true", "identifier": "1-0", "directory": "dir"}
    tables = {}
    for suffix, separator in ((".csv", ","), (".tsv", "\t")):
        table = io.StringIO()
        writer = csv.writer(table, delimiter=separator)
        writer.writerow(["image", "caption", "id", "split"])
        writer.writerows([[row.get("image", "a.png"), row.get("caption", "x"), row.get("id", ""), ""] for row in rows])
        tables[suffix] = table.getvalue().encode()
    arrow = io.BytesIO()
    cells = pa.table({"image": [tiny_model.png()] * 2, "caption": [["a", "b"], ["c"]], "image_id": ["1", "2"]})
    with pa.ipc.new_file(arrow, cells.schema) as out:
        out.write_table(cells)
    return {
        ".jsonl": lines.encode(),
        ".json": (json.dumps(nlvr) + "\n").encode() * 3,
        **tables,
        ".arrow": arrow.getvalue(),
    }


class Calls:
    """Pickled as a call."""

    def __init__(self, function: object, *args: object) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple:
        return self.reduced


def annotations(canary: Path) -> dict[str, bytes]:
    """Pickles of ALIGN-BENCH's form in every protocol, and hostile ones, which would leave `canary`."""
    mask = np.zeros((48, 64), bool)
    mask[4:9, 3:30] = True
    made = {}
    for kind, array in (("numpy", mask), ("torch", torch.tensor(mask)), ("fortran", np.asfortranarray(mask))):
        regions = [{"bbox_mask": [3.0, 4.0, 30.0, 9.0], "pixel_mask": array}]
        content = {"caption": "a red star above a ring", "annotation": {"a red star": regions, "a ring": regions}}
        made |= {f"{kind}.{protocol}": pickle.dumps(content, protocol) for protocol in (2, 4, 5)}
    ordered = collections.OrderedDict(caption="a ring", annotation={"a ring": []})
    made["ordered"] = pickle.dumps(ordered, 2)
    made["hostile.system"] = pickle.dumps({"caption": Calls(os.system, f"touch {canary}")}, 2)
    made["hostile.eval"] = pickle.dumps({"caption": Calls(eval, f"open({str(canary)!r}, 'w')")}, 4)
    return made


def weights(folder: Path) -> dict[str, dict[str, bytes]]:
    """A tiny model under the authors' names as safetensors and as torch files of both formats."""
    run = tiny_model.write_run(folder / "tiny")
    to_torch(run, folder / "exported", say=lambda _: None)
    file = folder / "exported" / "model.safetensors"
    made = {"safetensors": {"model": file.read_bytes()}, "torch_zip": {}, "torch_legacy": {}}
    tensors = load_file(file)
    for name, content in (("bare", tensors), ("lightning", {"epoch": 3, "state_dict": tensors, "lr": [0.1]})):
        for kind, zipped in (("torch_zip", True), ("torch_legacy", False)):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
            made[kind][name] = buffer.getvalue()
    return made


def main(folder: Path) -> None:
    """Writes <folder>/seeds/<kind>/<name>, <folder>/data, <folder>/media and <folder>/tokenizer."""
    everything = {"images": pictures(), "clips": clips(), "captions": captions(folder / "media"), **weights(folder)}
    everything["annotations"] = annotations(folder / "canary")
    everything["texts"] = {str(number): text.encode() for number, text in enumerate(TEXTS)}
    for kind, files in everything.items():
        (folder / "seeds" / kind).mkdir(parents=True)
        for name, data in files.items():
            (folder / "seeds" / kind / f"seed{name if name.startswith('.') else '.' + name}").write_bytes(data)
    for name in ("toy_world/questions", "toy_world/videos"):
        prepare(name, folder / "data", train=5, validation=4, test=1)
    train_tokenizer([text.replace("\0", "") for text in TEXTS] * 3, folder / "tokenizer", 400)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
