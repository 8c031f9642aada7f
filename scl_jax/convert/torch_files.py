"""Reading strangers' weights as data, and writing safetensors so that nothing half-written is ever seen.

`read_tensors` maps a file into memory and gives NumPy views of it: a tensor costs memory only when it is touched, so
the weights of a 4 GB checkpoint are read without its optimizer state, and without torch. It takes

- `.safetensors`;
- torch's zip files (`.pt`, `.bin`, `.ckpt`): bare state_dicts, Lightning checkpoints, TorchScript archives such as
  OpenAI's CLIP. Their pickles are never run: `torch_pickle.py` states the rule;
- torch files older than version 1.6, through `torch.load(weights_only=True)`;
- Hugging Face folders: `model.safetensors` or `pytorch_model.bin`, whole or in shards.

NaNs and wrong names are for the caller to judge: this file gives what is there.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from scl_jax.convert.torch_pickle import DTYPES, ScriptObject, TorchFileError, unpickle

__all__ = ["TorchFileError", "read_tensors", "write_safetensors"]

_LARGEST_PICKLE = 256 * 2**20  # bytes; a real one is some hundred kilobytes
_CHUNK = 2**20  # bytes read at once for a checksum
_MOST_OBJECTS = 100_000  # modules and attributes of a TorchScript archive
_NESTED = ("state_dict", "model_state_dict", "model", "module")  # where a checkpoint keeps its weights, in this order
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch before 1.6, pickled
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NO_TORCH_FILES = {  # first bytes → what somebody saved under this name by mistake
    b"<": "an HTML or XML page: the download needs a login or another link",
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull`",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"\x89HDF": "an HDF5 file (TensorFlow's): ask for PyTorch weights or safetensors",
    b"\x80": "a bare pickle, which is a program: it is not run. Ask for a safetensors file",
}
_SAFETENSORS_DTYPES = {
    "F64": DTYPES["float64"],
    "F32": DTYPES["float32"],
    "F16": DTYPES["float16"],
    "BF16": DTYPES["bfloat16"],
    "F8_E4M3": DTYPES["float8_e4m3fn"],
    "F8_E5M2": DTYPES["float8_e5m2"],
    "C64": DTYPES["complex64"],
    "I64": DTYPES["int64"],
    "I32": DTYPES["int32"],
    "I16": DTYPES["int16"],
    "I8": DTYPES["int8"],
    "U64": DTYPES["uint64"],
    "U32": DTYPES["uint32"],
    "U16": DTYPES["uint16"],
    "U8": DTYPES["uint8"],
    "BOOL": DTYPES["bool"],
}


def read_tensors(path: str | Path) -> Mapping[str, np.ndarray]:
    """The weights in a file or Hugging Face folder, by name, as read-only views of the mapped file.

    Args:
        path: a `.safetensors` or torch file of any name, or a folder.

    Raises:
        FileNotFoundError: there is nothing at `path`, or a folder lacks the weights or a shard.
        TorchFileError: the file is broken, is something else, or its pickle would run code; the message begins with
            the file's name.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.is_dir():
        return _read_folder(path)
    try:
        return _read_file(path)
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from error


def _read_file(path: Path) -> Mapping[str, np.ndarray]:
    if not path.is_file():
        raise TorchFileError("not a regular file")
    if path.stat().st_size == 0:
        raise TorchFileError("the file is empty")
    data = np.memmap(path, np.uint8, mode="r")
    start = bytes(data[:64])
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(path, data)
    if start.startswith(_LEGACY):
        return _read_legacy(path)
    # a safetensors file: the length of its header, then the header
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return _read_safetensors(path, data)
    for beginning, what in _NO_TORCH_FILES.items():
        if start.lstrip().startswith(beginning):
            raise TorchFileError(f"not a torch file but {what}")
    raise TorchFileError(f"neither a torch nor a safetensors file (it begins with {start[:8]!r})")


def _read_folder(folder: Path) -> Mapping[str, np.ndarray]:
    name = next((name for name in _FOLDER_FILES if (folder / name).exists()), None)
    if name is None:
        raise FileNotFoundError(f"{folder}: a folder with none of {', '.join(_FOLDER_FILES)}; give the file itself")
    if not name.endswith(".json"):
        return read_tensors(folder / name)
    index = folder / name
    try:
        shard_of = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise TorchFileError(f"{index}: not an index of shards ({type(error).__name__}: {error})") from error
    tensors: dict[str, np.ndarray] = {}
    for shard in sorted(set(map(str, shard_of.values()))):
        if Path(shard).name != shard:
            raise TorchFileError(f"{index}: shard {shard!r} is outside the folder")
        found = read_tensors(folder / shard)
        wanted = [name for name, value in shard_of.items() if value == shard]
        missing = [name for name in wanted if name not in found]
        if missing:
            raise TorchFileError(f"{folder / shard}: lacks {', '.join(missing)}, which {index.name} promises")
        tensors |= {name: found[name] for name in wanted}
    return tensors


def _read_safetensors(path: Path, data: np.ndarray) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="numpy"):  # checks the header: sizes, offsets, gaps, overlaps
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise TorchFileError(f"a broken safetensors file ({error}): download it again") from error
    length = int.from_bytes(bytes(data[:8]), "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise TorchFileError(f"tensor {name!r} has the type {entry['dtype']}, which is not supported")
        dtype, offset = _SAFETENSORS_DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0]
        tensors[name] = np.ndarray(entry["shape"], dtype, data, offset)
    return tensors


def _read_zip(path: Path, data: np.ndarray) -> dict[str, np.ndarray]:
    archive = _Archive(path, data)
    names = [name for name in archive.infos if name == "data.pkl" or re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(names) != 1:
        raise TorchFileError("a zip file, but no torch checkpoint: it has no data.pkl")
    root = names[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.infos and bytes(archive.entry(f"{root}byteorder")).strip() != b"little":
        raise TorchFileError("written on a big-endian machine, which is not supported: save it again elsewhere")
    content = archive.entry(names[0])
    if len(content) > _LARGEST_PICKLE:
        raise TorchFileError(f"its pickle has {len(content)} bytes: no state_dict looks like this")
    archive.check(names[0])
    weights = _weights(unpickle(content.tobytes(), lambda key: archive.entry(f"{root}data/{key}")))
    for name in archive.holding(weights.values()):
        archive.check(name)
    return weights


class _Archive:
    """A zip file whose entries are views of the mapped file: torch compresses no tensors, so nothing is unpacked."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data = path, data
        try:
            with zipfile.ZipFile(path) as archive:
                self.infos = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OSError) as error:
            raise TorchFileError(f"truncated or broken ({error}): download it again") from error
        claimed = sum(info.compress_size for info in self.infos.values())
        if claimed > len(data):
            raise TorchFileError(f"its entries claim {claimed} bytes, more than the file's {len(data)}")

    def entry(self, name: str) -> np.ndarray:
        """The bytes of an entry."""
        begin, end = self._span(name)
        return self.data[begin:end]

    def check(self, name: str) -> None:
        """Compares an entry with its checksum, where torch was not told to leave it out (it then writes a 0)."""
        begin, end = self._span(name)
        checksum = 0
        with self.path.open("rb") as file:  # read, not mapped: pages of a map would count as memory in use
            file.seek(begin)
            for size in [_CHUNK] * ((end - begin) // _CHUNK) + [(end - begin) % _CHUNK]:
                checksum = zlib.crc32(file.read(size), checksum)
        if self.infos[name].CRC not in (0, checksum):
            raise TorchFileError(f"its entry {name!r} is damaged (wrong checksum): download it again")

    def holding(self, views: Iterable[np.ndarray]) -> list[str]:
        """The storages that these views of the file lie in."""
        base = self.data.__array_interface__["data"][0]
        storages = [name for name, info in self.infos.items() if "/data/" in f"/{name}" and info.file_size]
        spans = sorted((*self._span(name), name) for name in storages)
        begins = [begin for begin, _, _ in spans]
        found = {}
        for view in views:
            begin = view.__array_interface__["data"][0] - base
            which = bisect_right(begins, begin) - 1
            if view.size and which >= 0 and begin < spans[which][1]:
                found[spans[which][2]] = None
        return list(found)

    def _span(self, name: str) -> tuple[int, int]:
        if name not in self.infos:
            raise TorchFileError(f"its entry {name!r} is missing")
        info, data = self.infos[name], self.data
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise TorchFileError(f"its entry {name!r} is compressed or encrypted, which torch never does")
        head = info.header_offset
        if not 0 <= head <= len(data) - 30 or bytes(data[head : head + 4]) != b"PK\x03\x04":
            raise TorchFileError(f"its entry {name!r} is not where the archive says")
        name_length, extra_length = struct.unpack("<HH", bytes(data[head + 26 : head + 30]))
        begin = head + 30 + name_length + extra_length
        if begin + info.file_size > len(data):
            raise TorchFileError(f"its entry {name!r} ends behind the end of the file")
        return begin, begin + info.file_size


def _weights(content: Any) -> dict[str, np.ndarray]:
    """The named tensors in what a torch file holds; other content (epoch, optimizer state, …) is left alone."""
    if isinstance(content, ScriptObject):
        return dict(_script_tensors(content))
    if not isinstance(content, Mapping):
        raise TorchFileError("it holds no state_dict (a whole module was pickled?): save model.state_dict()")
    for candidate in [content[key] for key in _NESTED if key in content] + [content]:
        if isinstance(candidate, Mapping):
            named = {name: value for name, value in candidate.items() if isinstance(value, np.ndarray)}
            if named:
                if not all(isinstance(name, str) for name in named):
                    raise TorchFileError("its tensors are not named by strings: give the state_dict of a model")
                return named
    raise TorchFileError(
        f"no tensors under {', '.join(_NESTED)} or at its top; its keys: {', '.join(map(str, content))[:200]}"
    )


def _script_tensors(module: ScriptObject) -> Iterator[tuple[str, np.ndarray]]:
    """Walks a TorchScript module by its attributes: the names are those of its state_dict."""
    waiting, seen = [("", module)], 0
    while waiting:
        prefix, current = waiting.pop()
        for name, value in (current.state or {}).items():
            seen += 1
            if seen > _MOST_OBJECTS:
                raise TorchFileError("its modules contain each other or are far too many")
            if isinstance(value, np.ndarray):
                yield f"{prefix}{name}", value
            elif isinstance(value, ScriptObject):
                waiting.append((f"{prefix}{name}.", value))


def _read_legacy(path: Path) -> dict[str, np.ndarray]:
    """A file of torch before 1.6, which is a chain of pickles: torch's own restricted unpickler reads it."""
    try:
        import torch
    except ImportError as error:
        raise TorchFileError(
            "in the format of torch before 1.6, which only torch reads: pip install 'scl_jax[torch]'"
        ) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))  # torch's own advice, to switch the protection off, is left out
        reason = f"its pickle names {found[1]}" if found else "its pickle is broken"
        raise TorchFileError(f"refused by torch.load(weights_only=True): {reason}; nothing was run") from error
    except Exception as error:  # a broken file can raise anything
        raise TorchFileError(f"truncated or broken ({type(error).__name__}: {error}): download it again") from error

    def as_array(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: as_array(item) for name, item in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        if value.dtype == torch.bfloat16:
            return value.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return value.detach().numpy()

    return _weights(as_array(content))


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes tensors (any layout) beside the target, flushes them to the disk and renames: all of it or nothing.

    Raises:
        OSError: the disk is full, the folder missing or read-only, …; no file is left and an older one is untouched.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        contiguous = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()}
        safetensors.numpy.save_file(contiguous, partial, dict(metadata))
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        size = sum(value.nbytes for value in tensors.values())
        raise OSError(
            f"{path}: could not write {size / 2**20:.1f} MiB of weights ({error}); nothing was left"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
