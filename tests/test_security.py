"""No file of a stranger is ever run: nothing here calls what would, and what reads such files is in a short list."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("scl_jax", "configs", "benchmarks", "launch", "notebooks", "typings")
    for path in (ROOT / folder).rglob("*.py*")
    if path.suffix in (".py", ".pyi")
) + [ROOT / "setup.py"]

NEVER = {  # whatever the arguments
    *("eval", "exec", "compile", "__import__", "breakpoint"),
    *("os.system", "os.popen", "os.execv", "os.execvp", "os.execl", "os.spawnl", "os.spawnv", "pty.spawn"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("pickle.load", "pickle.loads", "_pickle.load", "_pickle.loads", "marshal.load", "marshal.loads", "shelve.open"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "pandas.read_pickle"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "runpy.run_path", "runpy.run_module"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"),
    *("xml.etree.ElementTree.parse", "xml.dom.minidom.parse", "tempfile.mktemp"),
}
UNPACKING = {"extractall", "extract", "unpack_archive"}  # would need a look at every name: "../../.bashrc"
RESTRICTED = {"scl_jax/convert/torch_pickle.py", "scl_jax/evaluation/alignment/plain_pickle.py"}  # unpicklers of ours


def names_of(tree: ast.AST) -> dict[str, str]:
    """What the names of a file stand for: `import numpy as np` → {"np": "numpy"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                      for alias in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def full_name(node: ast.AST, names: dict[str, str]) -> str:
    """`np.load` → "numpy.load"; of a method of something computed, the method alone."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, names)}.{node.attr}"
    return ""


def literal(call: ast.Call, argument: str) -> object:
    """The value of a keyword that is written out; None where it is not given, ... where it is computed."""
    for keyword in call.keywords:
        if keyword.arg == argument:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return None


def dangers(source: str, file: str = "") -> list[str]:
    """What of a file could run a stranger's code, as "line: what"."""
    tree = ast.parse(source)
    names = names_of(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and file not in RESTRICTED:
            bases = [full_name(base, names) for base in node.bases]
            found += [f"{node.lineno}: subclass of {base}" for base in bases if base.endswith(".Unpickler")]
        if isinstance(node, ast.Name | ast.Attribute) and full_name(node, names) in NEVER:
            found.append(f"{node.lineno}: {full_name(node, names)}")
        if not isinstance(node, ast.Call):
            continue
        name = full_name(node.func, names)
        if name == "torch.load" and literal(node, "weights_only") is not True:
            found.append(f"{node.lineno}: torch.load without weights_only=True")
        if name.startswith("numpy.") and literal(node, "allow_pickle") not in (None, False):
            found.append(f"{node.lineno}: {name} with allow_pickle")
        if literal(node, "shell") not in (None, False) or literal(node, "trust_remote_code") not in (None, False):
            found.append(f"{node.lineno}: {name} with shell or trust_remote_code")
        if name.rpartition(".")[2] in UNPACKING:
            found.append(f"{node.lineno}: {name} unpacks an archive")
        if name.endswith("pickle.Unpickler") and file not in RESTRICTED:
            found.append(f"{node.lineno}: an unrestricted Unpickler")
    return found


def test_no_file_calls_what_could_run_a_strangers_code():
    assert len(SOURCES) > 100
    files = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in SOURCES}
    assert {file: found for file, text in files.items() if (found := dangers(text, file))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle; pickle.load(file)",
        "import pickle as p; p.loads(data)",
        "from pickle import loads as read; read(data)",
        "import pickle; pickle.Unpickler(file).load()",
        "import pickle\nclass Mine(pickle.Unpickler): ...",
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch; torch.load(path, weights_only=flag)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import yaml; yaml.load(text)",
        "eval(text)",
        "run = exec",
        "import os; os.system(command)",
        "from os import system; system(command)",
        "import subprocess; subprocess.run(command, shell=True)",
        "import subprocess; subprocess.check_output(command, shell=flag)",
        "import tarfile; tarfile.open(path).extractall(folder)",
        "import shutil; shutil.unpack_archive(path)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(line):
    assert dangers(line)


@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path, weights_only=True)",
        "import subprocess; subprocess.run([program, argument])",
        "import json; json.load(file)",
        "model.eval()",
        "import re; re.compile(pattern)",
        "step.lower(state).compile()",
        "import zipfile; zipfile.ZipFile(path).infolist()",
    ],
)
def test_the_search_finds_nothing_else(line):
    assert not dangers(line)


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_no_shell_script_runs_text_that_it_puts_together_or_downloads(script):
    text = script.read_text("utf-8")
    assert not re.search(r"^\s*eval\b|\b(curl|wget)\b[^\n]*\|\s*(ba)?sh\b", text, re.MULTILINE)
