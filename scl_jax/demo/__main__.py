"""A web page on a trained model: `python -m scl_jax.demo --checkpoint=runs/quickstart --toy_scenes=60`.

    python -m scl_jax.demo --checkpoint=runs/quickstart --checkpoint=runs/vqa_toy --folder=pictures

Tabs: search a folder by text; match and attention of a text and a picture; questions; masked words. For each the first
checkpoint that has the head. Open to this machine only, unless --host says otherwise. Needs the extra `demo`.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m scl_jax.demo", description=__doc__, formatter_class=form)
    p.add_argument("--checkpoint", action="append", required=True, help="what scl_jax.load takes; may be repeated")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--folder", type=Path, help="pictures and clips to search in")
    what.add_argument("--toy_scenes", type=int, default=0, help="search in that many held-out scenes of the toy world")
    p.add_argument("--index", type=Path, help="keeps the index (toy scenes beside it), or holds it already")
    p.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to the network: there is no password")
    p.add_argument("--port", type=int, default=7860, help="from 1 to 65535")
    p.add_argument("--max_upload", type=float, default=20, help="MiB of an uploaded picture")
    return p


def prepare(options: argparse.Namespace, place: Path):
    """Loads the checkpoints and indexes the folder.

    Args:
        place: for files that are gone after the demo.

    Raises:
        ValueError, OSError: bad input; the message says what to change.
    """
    from scl_jax.demo.service import Service
    from scl_jax.inference import load
    from scl_jax.search import Index, build

    models = [load(name) for name in options.checkpoint]
    folder, at = options.folder, options.index or place / "index"
    if options.toy_scenes:
        # a kept index needs its pictures: they lie beside it
        scenes = place / "scenes" if options.index is None else at.with_name(f"{at.name}_{options.toy_scenes}_scenes")
        folder = _draw_scenes(scenes, options.toy_scenes)
    if folder is not None and not (at / "manifest.json").exists():
        model = Service(models).with_head("contrastive")
        print(f"reading {folder} …", flush=True)
        for one in build(model, folder, at)["broken"]:
            print(f"left out: {one['reason']}", file=sys.stderr)
    elif folder is None and options.index is None:
        return Service(models, None, options.max_upload)
    index = Index(at)
    if folder is not None and Path(index.manifest["folder"]) != folder.absolute():
        raise ValueError(f"{at} is the index of {index.manifest['folder']}: give another --index, or no --folder")
    return Service(models, index, options.max_upload)


def _draw_scenes(folder: Path, count: int) -> Path:
    from scl_jax.data.builders import toy_world

    folder.mkdir(parents=True, exist_ok=True)
    for record in toy_world.records("images", "test", count, 0):
        (folder / f"{record['id']}.jpg").write_bytes(record["media"])
    return folder


def main(arguments: list[str] | None = None) -> None:
    """The command; errors of input end it with one message and status 1."""
    form = parser()
    options = form.parse_args(arguments)
    if not 1 <= options.port <= 65535:
        form.error(f"--port={options.port}: from 1 to 65535")
    if not 0 < options.max_upload < math.inf:
        form.error(f"--max_upload={options.max_upload:g}: a number above 0")
    if options.toy_scenes < 0:
        form.error(f"--toy_scenes={options.toy_scenes}: a number from 1 on, or none")
    with tempfile.TemporaryDirectory(prefix="scl_jax_demo_") as place:
        import os

        os.environ["GRADIO_TEMP_DIR"] = str(Path(place) / "uploads")
        try:
            from scl_jax.demo.page import launch, page
        except ImportError as error:
            sys.exit(f'error: the demo needs its extra: pip install "scl_jax[demo]" ({error})')
        try:
            blocks = page(prepare(options, Path(place)))
            print(f"http://{options.host}:{options.port}  (Ctrl-C ends it)", flush=True)
            launch(blocks, options.host, options.port, options.max_upload)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
