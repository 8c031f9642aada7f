"""Writes notebooks/*.ipynb from the scripts beside them: `python launch/notebooks.py`; `--check` only compares.

The scripts are what is read and reviewed; notebooks are what Colab opens. Needs jupytext (requirements-dev.txt).
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent.parent / "notebooks"


def notebook_of(script: Path) -> str:
    """The notebook of a script, without outputs; cells are numbered, so that the same script gives the same bytes."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata.pop("jupytext", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return nbformat.writes(notebook, version=4) + "\n"


def main(check: bool) -> int:
    """Returns 1 when a notebook differs from its script and is only to be checked."""
    different = []
    for script in sorted(FOLDER.glob("*.py")):
        target, content = script.with_suffix(".ipynb"), notebook_of(script)
        if not target.exists() or target.read_text() != content:
            different.append(target.name)
            if not check:
                target.write_text(content)
    if different:
        print(f"{'differ from their scripts' if check else 'written'}: {', '.join(different)}")
    return int(check and bool(different))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
