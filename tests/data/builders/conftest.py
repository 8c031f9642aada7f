"""Miniatures of the public data sets, as their owners write them."""

from __future__ import annotations

import pytest
import raw_trees

from scl_jax.data.builders import vqav2


@pytest.fixture(scope="session")
def trees(tmp_path_factory):
    """Every data set's tree and arrow files, by name."""
    root = tmp_path_factory.mktemp("trees")
    folders = {}
    for name, write in raw_trees.TREES.items():
        folders[name] = root / write.__name__ / "tree", root / write.__name__ / "arrow"
        write(*folders[name])
    return folders


@pytest.fixture
def tree(tmp_path):
    """Writes a fresh tree that a test may damage."""

    def write(name):
        raw_trees.TREES[name](tmp_path / "tree", tmp_path / "arrow")
        return tmp_path / "tree"

    return write


@pytest.fixture(autouse=True)
def small_vocabulary(monkeypatch):
    monkeypatch.setitem(vqav2.make_builder.__kwdefaults__, "answers_at_least", 2)
    monkeypatch.setattr(vqav2, "VALIDATION_IMAGES", 1)
