"""The notebooks agree with their scripts, and run from a clean kernel one after the other on a very small network."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
NAMES = ("1_quickstart", "2_inference", "3_own_captions", "4_pytorch")


def load_sync():
    spec = importlib.util.spec_from_file_location("notebooks_sync", ROOT / "launch" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_what_its_script_says(name):
    sync, script = load_sync(), ROOT / "notebooks" / f"{name}.py"
    assert script.with_suffix(".ipynb").read_text() == sync.notebook_of(script, sync.address()), (
        "run launch/notebooks.py"
    )


def test_every_script_has_a_name_here():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == sorted(NAMES)
    assert sorted(load_sync().CONTENTS) == sorted(NAMES)


def test_readme_lists_the_notebooks_where_they_lie():
    sync, readme = load_sync(), (ROOT / "README.md").read_text()
    assert sync.readme_of(readme, sync.address()) == readme, "run launch/notebooks.py"
    for place in re.findall(r"\]\((notebooks/[^)]+)\)", readme):
        assert (ROOT / place).exists()


def test_badges_open_the_notebooks_of_the_repository_that_citation_names():
    sync, home = load_sync(), "https://github.com/me/scl_jax"
    page = "https://colab.research.google.com/github/me/scl_jax/blob/main/"
    readme = sync.readme_of((ROOT / "README.md").read_text(), home)
    links = re.findall(rf"\]\({re.escape(page)}([^)]+)\)", readme)
    assert links == [f"notebooks/{name}.ipynb" for name in NAMES]
    for name in NAMES:
        notebook = nbformat.reads(sync.notebook_of(ROOT / "notebooks" / f"{name}.py", home), as_version=4)
        assert f"({page}notebooks/{name}.ipynb)" in notebook.cells[0].source
        assert f'os.environ.get("SCL_REPOSITORY", "{home}")' in notebook.cells[1].source
    assert sync.badge("", "1_quickstart") == ""  # no public home, no badge


@pytest.mark.parametrize("installs", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_colab_has_already_does_not_count_as_installed(name, installs, tmp_path, monkeypatch):
    """Colab has grain, jax and flax, the latter too old, and no simplejpeg."""
    (tmp_path / "scl_jax").mkdir()
    (tmp_path / "scl_jax" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    find, asked = importlib.util.find_spec, []

    def find_spec(module):
        return None if module == "simplejpeg" and not (asked and installs) else find(module)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    cell = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells[1].source
    shell = SimpleNamespace(run_line_magic=lambda magic, line: asked.append(f"{magic} {line}"))
    names = {"get_ipython": lambda: shell}
    if installs:
        exec(TransformerManager().transform_cell(cell), names)  # noqa: S102 (a cell of our own notebook)
    else:
        with pytest.raises(ImportError, match="pip says above why"):
            exec(TransformerManager().transform_cell(cell), names)  # noqa: S102
    assert asked == ['pip install --quiet -e "$library"']
    extras = Requirement(f"scl_jax{names['library'].removeprefix('.')}").extras
    assert extras <= {"gpu", "tpu", "torch"} and ("torch" in extras) == ("torch" in name)
    assert names["library"] == "." or extras  # pip refuses ".[]"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the repository, in which runs and data may be left."""
    folder = tmp_path_factory.mktemp("notebooks")
    for name in ("scl_jax", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_a_clean_kernel(name, workplace, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SCL_SCENES", "48")
    monkeypatch.setenv("SCL_EXTRA", "--config.debug=true")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=3600, resources={"metadata": {"path": str(workplace)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(output.output_type in ("stream", "display_data", "execute_result") for output in outputs)
