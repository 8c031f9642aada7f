"""What README prints runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import toy_run

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_lines_of_use_a_trained_model_run_as_printed(tiny_run, tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"## Use a trained model\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    toy_run.prepare(tmp_path / "data")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(tiny_run)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(block, {})  # noqa: S102 (the lines of our own README)
    assert "Ranked(index=0" in capsys.readouterr().out
