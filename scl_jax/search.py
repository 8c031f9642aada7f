"""Search in one's own pictures and clips: `python -m scl_jax.search build|query`.

    python -m scl_jax.search build pictures/ runs/index --checkpoint=runs/quickstart
    python -m scl_jax.search query runs/index --text "a red star" -k 5
    python -m scl_jax.search query runs/index --media star.jpg

<index>/features.npy   unit vectors, float32 (items, width), mapped from the disk, never loaded as a whole
<index>/items.txt      the file of each row, relative to the folder, as a JSON string
<index>/manifest.json  folder, checkpoint, the files that could not be read
<index>/faiss.index    above a million items, where faiss is installed: approximate, faster; else every item is compared
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.lib.format import open_memmap

from scl_jax.convert.checkpoints import beside
from scl_jax.inference.answers import print_json
from scl_jax.inference.media import IMAGE_ENDINGS, VIDEO_ENDINGS, MediaError, clip_pixels, image_pixels
from scl_jax.inference.model import Model, check_count, load

FAISS_ABOVE = 1_000_000  # items
CHUNK = 65_536  # items compared at once
MARKS = ("manifest.json", "items.txt", "features.npy")  # in every index
_THREADS = 4
_FAISS_LISTS_SEARCHED = 32
_FAISS_TRAINING = 200_000  # items that its clusters are learned from


class Found(NamedTuple):
    """One answer of a query."""

    path: str
    similarity: float  # cosine


def files_of(folder: Path) -> list[Path]:
    """The images and videos below a folder, by the ending of their names, sorted.

    Raises:
        FileNotFoundError: there is no such folder, or none in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (*IMAGE_ENDINGS, *VIDEO_ENDINGS))
    found = [path for path in found if path.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: no image or video in it ({', '.join((*IMAGE_ENDINGS, *VIDEO_ENDINGS))})")
    return found


def build(
    model: Model,
    folder: Path | str,
    index: Path | str,
    *,
    checkpoint: str = "",
    overwrite: bool = False,
    faiss_above: int = FAISS_ABOVE,
) -> dict[str, Any]:
    """Encodes the images and videos of a folder and writes an index; files that cannot be read are listed, not fatal.

    Returns:
        The manifest; its "broken" has a path and a reason each.

    Raises:
        FileNotFoundError: there is nothing to index; FileExistsError: there is such an index, or something else there.
        ValueError: not one file could be read, the checkpoint has no contrastive head, or the index would take the
            place of the folder or the checkpoint.
    """
    folder, index = Path(folder), Path(index)
    files = files_of(folder)
    broken: list[dict[str, str]] = []
    width = model.encode_texts("a").shape[1]
    size = 2 * len(files) * width * 4  # rows and features.npy lie there together for a moment
    with beside(index, overwrite, size, MARKS, [folder, model.name]) as target:
        names: list[str] = []
        with (target / "rows").open("wb") as rows:
            for batch, features in _encoded(model, files, broken):
                rows.write(features.astype("<f4").tobytes())
                names += [path.relative_to(folder).as_posix() for path in batch]
        if not names:
            raise ValueError(f"{folder}: none of {len(files)} files can be read; the first: {broken[0]['reason']}")
        _rows_to_npy(target / "rows", target / "features.npy", (len(names), width))
        # as ASCII: names may hold any character that ends a line, and bytes that are no text at all
        (target / "items.txt").write_text("\n".join(map(json.dumps, names)) + "\n")
        manifest = {
            "folder": str(folder.absolute()),
            "checkpoint": _absolute(checkpoint or model.name),
            "fingerprint": model.fingerprint,
            "items": len(names),
            "width": width,
            "broken": [{**one, "path": Path(one["path"]).relative_to(folder).as_posix()} for one in broken],
        }
        if len(names) > faiss_above:
            manifest["faiss"] = _write_faiss(target)
        (target / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _absolute(checkpoint: str) -> str:
    """A path as every folder names it; names on the hub as they are."""
    path = Path(os.path.expanduser(checkpoint))
    return str(path.absolute()) if path.exists() else checkpoint


def _encoded(
    model: Model, files: Sequence[Path], broken: list[dict[str, str]]
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Batches of readable files and their features; the others go to `broken`."""

    def read(path: Path) -> np.ndarray | MediaError:
        try:
            if path.suffix.lower() in VIDEO_ENDINGS:
                return clip_pixels(path, model.video_frames, model.video_size)
            return image_pixels(path, model.image_size)[0]
        except MediaError as error:
            return error

    size = model.network.batch_sizes[-1]
    with ThreadPoolExecutor(_THREADS) as pool:
        for endings, encode in ((IMAGE_ENDINGS, model.encode_images), (VIDEO_ENDINGS, model.encode_videos)):
            kind = [path for path in files if path.suffix.lower() in endings]
            for start in range(0, len(kind), size):
                batch = kind[start : start + size]
                read_ones = list(zip(batch, pool.map(read, batch), strict=True))
                broken += [{"path": str(p), "reason": str(e)} for p, e in read_ones if isinstance(e, MediaError)]
                good = [(path, pixels) for path, pixels in read_ones if isinstance(pixels, np.ndarray)]
                if good:
                    yield [path for path, _ in good], encode([pixels for _, pixels in good])


def _rows_to_npy(rows: Path, target: Path, shape: tuple[int, int]) -> None:
    """Raw float32 rows become a .npy file, a chunk at a time."""
    source = np.memmap(rows, "<f4", "r", shape=shape)
    mapped = open_memmap(target, "w+", np.dtype("<f4"), shape)
    for start in range(0, shape[0], CHUNK):
        mapped[start : start + CHUNK] = source[start : start + CHUNK]
    mapped.flush()
    del source
    rows.unlink()


class Index:
    """An index on the disk, ready for queries.

    Raises:
        FileNotFoundError: there is no index; ValueError: a part is damaged, or they do not fit each other.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text())
            lines = (self.folder / "items.txt").read_text().rstrip("\n").split("\n")
            self.items = [json.loads(line) for line in lines]
            self.features = open_memmap(self.folder / "features.npy", mode="r")  # which reads no pickles
            shape = (len(self.items), self.manifest["width"])
            if {"folder", "checkpoint", "fingerprint"} - set(self.manifest):
                raise ValueError("its manifest lacks a name")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(
                f"{self.folder}: no index ({error}); make one with `scl_jax.search build`"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self.folder}: a damaged index, or none ({error}); build it again") from error
        if self.features.shape != shape:
            raise ValueError(
                f"{self.folder}: {self.features.shape} features for {len(self.items)} items; build it again"
            )
        faiss, file = _faiss(), self.folder / "faiss.index"
        try:
            self._faiss = faiss.read_index(str(file)) if faiss is not None and file.exists() else None
        except RuntimeError as error:
            raise ValueError(f"{file} cannot be read ({error}); build the index again") from error

    def check(self, model: Model) -> None:
        """Raises ValueError for a model whose features cannot be compared with those of the index."""
        if model.fingerprint != self.manifest["fingerprint"]:
            made = self.manifest["checkpoint"]
            raise ValueError(f"{self.folder} was built with another checkpoint ({made}); build it again with this one")

    def query(self, feature: Float[np.ndarray, " E"], k: int = 10) -> list[Found]:
        """The k items of highest cosine, best first; ValueError for a k below 1."""
        check_count(k)
        if self._faiss is not None:
            scores, ids = (found[0] for found in self._faiss.search(feature[None].astype(np.float32), k))
            return [Found(self.items[i], float(score)) for i, score in zip(ids, scores, strict=True) if i >= 0]
        ids, scores = top_k(self.features, feature, k)
        return [Found(self.items[i], float(score)) for i, score in zip(ids, scores, strict=True)]


def top_k(
    features: Float[np.ndarray, "N E"], query: Float[np.ndarray, " E"], k: int, chunk: int = CHUNK
) -> tuple[Int[np.ndarray, " K"], Float[np.ndarray, " K"]]:
    """Ids and scores of the k rows (all, where there are fewer) of largest product with the query, best first.

    Rows go to the device `chunk` at a time; the last chunk is padded, so that one program serves all.
    """
    rows = len(features)
    chunk, k = min(chunk, 1 << max(0, rows - 1).bit_length()), min(k, rows)
    ids, scores = [], []
    for start in range(0, rows, chunk):
        part = np.asarray(features[start : start + chunk], np.float32)
        count = len(part)
        part = np.pad(part, ((0, chunk - count), (0, 0)))
        best, places = _best(part, jnp.asarray(query, jnp.float32), count, min(k, chunk))
        real = np.asarray(best) > -np.inf
        ids.append(start + np.asarray(places)[real])
        scores.append(np.asarray(best)[real])
    all_ids, all_scores = np.concatenate(ids), np.concatenate(scores)
    order = np.argsort(-all_scores, kind="stable")[:k]
    return all_ids[order], all_scores[order]


@partial(jax.jit, static_argnums=3)
def _best(features: Float[Array, "N E"], query: Float[Array, " E"], count: Int[Array, ""], k: int):
    scores = jnp.matmul(features, query, precision="highest")  # TF32 or bf16 would reorder near ties
    return jax.lax.top_k(jnp.where(jnp.arange(len(features)) < count, scores, -jnp.inf), k)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _write_faiss(folder: Path) -> str:
    """An inverted-file index beside the features; says what it is, or why there is none."""
    faiss = _faiss()
    if faiss is None:
        return "not installed: pip install 'scl_jax[search]'; every item is compared instead"
    features = np.load(folder / "features.npy", mmap_mode="r", allow_pickle=False)
    rows, width = features.shape
    lists = max(1, min(int(4 * rows**0.5), rows // 40))
    made = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    step = max(1, rows // _FAISS_TRAINING)
    made.train(np.ascontiguousarray(features[::step]))
    for start in range(0, rows, CHUNK):
        made.add(np.ascontiguousarray(features[start : start + CHUNK]))
    made.nprobe = min(_FAISS_LISTS_SEARCHED, lists)
    faiss.write_index(made, str(folder / "faiss.index"))
    return f"IVF of {lists} lists, {made.nprobe} searched"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m scl_jax.search", description=__doc__, formatter_class=form)
    commands = p.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="encode a folder")
    make.add_argument("folder", type=Path)
    make.add_argument("index", type=Path)
    make.add_argument("--checkpoint", required=True, help="what scl_jax.load takes")
    make.add_argument("--overwrite", action="store_true", help="replace an index that is there")
    ask = commands.add_parser("query", help="search an index")
    ask.add_argument("index", type=Path)
    what = ask.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="a description")
    what.add_argument("--media", help="an image or video file")
    ask.add_argument("--checkpoint", default="", help="where it is now, if it has moved since the index was built")
    ask.add_argument("-k", type=int, default=10, help="how many answers")
    return p


def run(options: argparse.Namespace) -> Any:
    """What the command line asks for, as plain data."""
    if options.command == "build":
        model = load(options.checkpoint)
        manifest = build(
            model, options.folder, options.index, checkpoint=options.checkpoint, overwrite=options.overwrite
        )
        for one in manifest["broken"]:
            print(f"left out: {one['reason']}", file=sys.stderr)
        return {**manifest, "broken": len(manifest["broken"])}
    index = Index(options.index)
    model = load(options.checkpoint or index.manifest["checkpoint"])
    index.check(model)
    feature = model.encode_texts(options.text) if options.text is not None else model.encode_media(options.media)
    return [found._asdict() for found in index.query(feature[0], options.k)]


def main(arguments: list[str] | None = None) -> None:
    """The command; errors of input end it with one message and status 1."""
    try:
        print_json(run(parser().parse_args(arguments)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
