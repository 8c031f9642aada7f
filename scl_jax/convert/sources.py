"""Where weights come from and go to: paths, or names on the Hugging Face hub; and float32 without NaNs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scl_jax.convert.rules import ConversionError
from scl_jax.convert.torch_files import read_tensors

HUB = "hub:"
_PARALLEL = "module."
_NAME = r"[\w.-]+(/[\w.-]+)?"
# what the encoders were trained with and this model computes with
CLIP_SETTINGS = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
ROBERTA_SETTINGS = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}


def locate(source: str) -> Path:
    """The path itself, or the downloaded folder of `hub:owner/name` (or of a name, where there is no such path).

    Raises:
        FileNotFoundError: there is no such path, and it is not to be had from the hub.
    """
    path = Path(os.path.expanduser(source))
    if not source.startswith(HUB) and (path.exists() or not re.fullmatch(_NAME, source)):
        if not path.exists():
            raise FileNotFoundError(f"{source}: no such file or folder")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    name = source.removeprefix(HUB)
    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt"]))
        if not any(folder.glob("*.safetensors")):  # older repositories
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "pytorch_model*.bin"]))
        return folder
    except (OSError, HFValidationError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(f"{source}: no such path, and not to be had from the hub ({reason})") from error


def upload(folder: Path, target: str, overwrite: bool) -> str:
    """Puts a folder on the hub as `hub:owner/name` and returns its address.

    Raises:
        FileExistsError: the repository is there already, and `overwrite` is not given; OSError: the hub cannot be
            reached, or refuses; ValueError: it knows no such names.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    unreachable: Any = HfHubHTTPError.__bases__[0]  # httpx's or httpx2's, by the hub's version; it is no OSError
    api, name = HfApi(), target.removeprefix(HUB)
    try:
        if api.repo_exists(name) and not overwrite:
            raise FileExistsError(f"{target} exists on the hub: choose another name, or give --overwrite")
        api.create_repo(name, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except unreachable as error:
        if isinstance(error, HfHubHTTPError):  # an answer of the hub, which is an OSError, too
            raise
        raise ConnectionError(f"{target}: the hub cannot be reached ({error}); nothing is lost, try again") from error


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file or folder; floats of any width as float32, everything else as it is.

    What PyTorch's data parallelism puts before every name is taken off.
    """
    tensors = read_tensors(path)
    shared = _PARALLEL if tensors and all(name.startswith(_PARALLEL) for name in tensors) else ""
    return {name.removeprefix(shared): _float32(value) for name, value in tensors.items()}


def _float32(value: np.ndarray) -> np.ndarray:
    is_float = value.dtype.kind == "f" or value.dtype.name.startswith(("bfloat", "float8"))
    return value.astype(np.float32) if is_float and value.dtype != np.float32 else value


def check_finite(tensors: Mapping[str, np.ndarray], names: list[str], where: Path | str) -> None:
    """Raises ConversionError naming every tensor among `names` that holds NaN or infinity, or no floats."""
    bad = [name for name in names if tensors[name].dtype != np.float32 or not np.isfinite(tensors[name]).all()]
    if bad:
        kinds = [f"{name} ({_trouble(tensors[name])})" for name in bad]
        raise ConversionError(f"{where}: weights that cannot be used: " + ", ".join(kinds))


def _trouble(value: np.ndarray) -> str:
    if value.dtype != np.float32:
        return f"of type {value.dtype}, not floats"
    return f"{int(np.isnan(value).sum())} NaN, {int(np.isinf(value).sum())} infinite of {value.size} numbers"


def settings_of(path: Path) -> tuple[Path, dict[str, Any]]:
    """The config.json of a folder, or beside a file, and what it holds: nothing where there is none.

    Raises:
        ConversionError: it cannot be read.
    """
    file = path / "config.json" if path.is_dir() else path.with_name("config.json")
    if not file.exists():
        return file, {}
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ConversionError(f"{file}: not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ConversionError(f"{file}: an object is expected, not a {type(settings).__name__}")
    return file, settings


def check_settings(path: Path, expected: Mapping[str, Any]) -> None:
    """Looks into the config.json of a folder, or beside a file: a network that computes something else is an error.

    Args:
        expected: settings that weights do not show, such as the activation, with the values of this model.

    Raises:
        ConversionError: names the setting.
    """
    file, settings = settings_of(path)
    settings = settings.get("vision_config") or settings
    for name, value in expected.items():
        if settings.get(name, value) != value:
            raise ConversionError(f"{file}: {name} is {settings[name]!r}, but this model computes with {value!r}")
