"""The config of `toy_run` as a file: `--config=tests/toy_config.py:<data folder>`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import toy_run  # noqa: E402


def get_config(data_dir: str):
    return toy_run.config(Path(data_dir))
