"""What pip may install: the ranges of setup.py hold what the tests run with, and not what is known to fail."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
SETUP = (ROOT / "setup.py").read_text()


@pytest.fixture(scope="module")
def ranges() -> dict[str, SpecifierSet]:
    tree = ast.parse(SETUP)
    (runtime,) = (node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "RUNTIME")
    return {need.name: need.specifier for need in map(Requirement, ast.literal_eval(runtime))}


def test_every_tested_version_lies_in_its_range(ranges):
    pins = [
        Requirement(line.partition("#")[0])
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line[0] != "#"
    ]
    assert {pin.name for pin in pins} >= set(ranges)
    for pin in pins:
        (version,) = (one.version for one in pin.specifier)
        assert ranges.get(pin.name, SpecifierSet()).contains(version), pin


def test_what_does_not_read_the_tokenizer_that_it_wrote_is_left_out(ranges):
    """Tokenizers 0.22: "argument 'merges': failed to extract"; transformers to 5.16 lose its splitting into words."""
    assert not ranges["tokenizers"].contains("0.22.2") and not ranges["transformers"].contains("5.16.1")
    assert ranges["transformers"].contains("5.17.0")


def test_the_python_of_colab_is_taken():
    (versions,) = re.findall(r'python_requires="(.*?)"', SETUP)
    assert all(SpecifierSet(versions).contains(version) for version in ("3.11.0", "3.12.1", "3.13.15"))
