"""Writes notebooks/*.ipynb from the scripts beside them: `python launch/notebooks.py`; `--check` only compares.

The scripts are what is read and reviewed; notebooks are what Colab opens. Needs jupytext (requirements-dev.txt).

Where the repository has a public home, `repository-code: "https://github.com/OWNER/NAME"` in CITATION.cff says so: the
notebooks then get that address to clone from and a Colab badge, and README's list of notebooks the same badges.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
BRANCH = "main"
CONTENTS = {
    "1_quickstart": "train on the toy world",
    "2_inference": "a trained model on your own pictures, attention maps, search",
    "3_own_captions": "train further on your own captions",
    "4_pytorch": "to PyTorch and back",
}
_LIST = re.compile(r"(<!-- notebooks: launch/notebooks.py -->\n).*?(<!-- end of notebooks -->)", re.DOTALL)
_NO_ADDRESS = 'os.environ.get("SCL_REPOSITORY", "")'


def address() -> str:
    """The public home of the repository; empty while there is none.

    Raises:
        ValueError: it is not on GitHub, which is where Colab opens notebooks from.
    """
    found = re.search(r"^repository-code:\s*[\"']?([^\"'\s]+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    if found and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", found[1]):
        raise ValueError(f"CITATION.cff: repository-code {found[1]} is no https://github.com/OWNER/NAME")
    return found[1] if found else ""


def badge(home: str, name: str) -> str:
    """A link that opens a notebook of a repository in Colab; empty without a home."""
    if not home:
        return ""
    place = f"{home.removeprefix('https://github.com/')}/blob/{BRANCH}/notebooks/{name}.ipynb"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})](https://colab.research.google.com/github/{place})"


def notebook_of(script: Path, home: str) -> str:
    """The notebook of a script, without outputs; cells are numbered, so that the same script gives the same bytes."""
    notebook = jupytext.read(script)
    if home:
        notebook.cells[0].source = f"{badge(home, script.stem)}\n\n{notebook.cells[0].source}"
        for cell in notebook.cells:
            cell.source = cell.source.replace(_NO_ADDRESS, _NO_ADDRESS.replace('""', f'"{home}"'))
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return nbformat.writes(notebook, version=4) + "\n"


def readme_of(readme: str, home: str) -> str:
    """README with its list of notebooks as it should be."""
    lines = [f"- [{name}](notebooks/{name}.ipynb): {what} {badge(home, name)}" for name, what in CONTENTS.items()]
    block = "".join(f"{line.rstrip()}\n" for line in lines)
    return _LIST.sub(lambda found: found[1] + block + found[2], readme)


def main(check: bool) -> int:
    """Returns 1 when a file differs from what it should be and is only to be checked."""
    home = address()
    wanted = {script.with_suffix(".ipynb"): notebook_of(script, home) for script in sorted(FOLDER.glob("*.py"))}
    wanted[ROOT / "README.md"] = readme_of((ROOT / "README.md").read_text(), home)
    different = [path for path, content in wanted.items() if not path.exists() or path.read_text() != content]
    for path in different if not check else ():
        path.write_text(wanted[path])
    if different:
        print(f"{'out of date' if check else 'written'}: {', '.join(path.name for path in different)}")
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
