"""Broken and malicious files give an error that names the file and says what is wrong; nothing in them is run."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from scl_jax.convert import torch_files
from scl_jax.convert.torch_files import TorchFileError, read_tensors, write_safetensors


def state_dict() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return collections.OrderedDict(
        {"layer.weight": torch.randn(4, 3, generator=generator), "layer.bias": torch.randn(4, generator=generator)}
    )


class Calls:
    """Pickled as a call of `function` with `args`."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple:
        return self.reduced


class Stored:
    """Pickled as a reference to a float32 storage of the archive."""

    def __init__(self, key: str, count: int) -> None:
        self.pid = ("storage", torch.FloatStorage, key, "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> object:
        return obj.pid if isinstance(obj, Stored) else None


def pickled(content: object) -> bytes:
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


def archive(path: Path, content: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """A torch zip file with this pickle and one storage "0" of twelve floats."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", content)
        for name, data in ({"data/0": np.arange(12, dtype="<f4").tobytes()} | entries).items():
            file.writestr(f"archive/{name}", data)
    return path


def tensor(offset: object, shape: object, strides: object, key: str = "0", count: int = 12) -> dict[str, object]:
    return {"w": Calls(torch._utils._rebuild_tensor_v2, Stored(key, count), offset, shape, strides, False, None)}


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "__builtin__.eval"),
        (exec, ("open('{}', 'w')",), "__builtin__.exec"),
        (getattr, ("text", "upper"), "__builtin__.getattr"),
        (subprocess.Popen, ("touch", "{}"), "Popen"),
        (torch.hub.load, ("somebody/repository", "model"), "torch.hub.load"),
        (torch.load, ("other.pt",), "torch.serialization.load"),
        (Calls, ("text",), "Calls"),
    ],
)
def test_a_pickle_that_would_run_code_is_not_run(tmp_path: Path, function: Callable, args: tuple, name: str) -> None:
    trace = tmp_path / "trace"
    call = Calls(function, *(arg.format(trace) for arg in args))
    torch.save({"state_dict": state_dict(), "more": call}, tmp_path / "w.ckpt")
    with pytest.raises(TorchFileError, match=rf"w\.ckpt: refused: its pickle names \S*{name}.*nothing was run"):
        read_tensors(tmp_path / "w.ckpt")
    assert not trace.exists()


def test_a_legacy_file_that_would_run_code_is_not_run(tmp_path: Path) -> None:
    content = {"w": torch.zeros(1), "more": Calls(os.system, f"touch {tmp_path / 'trace'}")}
    torch.save(content, tmp_path / "w.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(TorchFileError, match=r"w\.bin: refused by torch.load.*posix.system; nothing was run"):
        read_tensors(tmp_path / "w.bin")
    assert not (tmp_path / "trace").exists()


def test_a_function_of_ours_cannot_be_changed_by_a_pickle(tmp_path: Path) -> None:
    # BUILD with (None, {"_call": …}) on the function that rebuilds tensors
    content = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x05_callK\x01s\x86b."
    with pytest.raises(TorchFileError, match="tries to change a function"):
        read_tensors(archive(tmp_path / "w.pt", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>Sign in</html>", "not a torch file but an HTML or XML page"),
        (b"\n <html></html>", "not a torch file but an HTML or XML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00" + bytes(60), "compressed with gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
        (pickle.dumps(Calls(os.system, "true")), "a bare pickle, which is a program: it is not run"),
        (b"some words", "neither a torch nor a safetensors file .it begins with b'some wor'"),
        (torch_files._LEGACY + b"\x80\x02", r"refused by torch.load|truncated or broken"),
        (b"PK\x03\x04" + bytes(100), "truncated or broken .*download it again"),
        (struct.pack("<Q", 2**40) + b"{}", "a broken safetensors file"),
        (struct.pack("<Q", 2) + b"{}" + bytes(9), "a broken safetensors file"),
    ],
)
def test_what_is_no_torch_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(TorchFileError, match=rf"w\.pt: .*({message})"):
        read_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tensor(1, (3, 4), (4, 1)), r"shape \(3, 4\) at 1 lies outside its storage of 48 bytes"),
        (tensor(0, (2**40, 2**40), (2**40, 1)), "lies outside its storage"),
        (tensor(0, (3, 4), (1, 1)), "overlaps itself"),
        (tensor(0, (2**50,), (0,)), "overlaps itself"),
        (tensor(11, (12,), (-1,)), r"strides \(-1,\)"),
        (tensor(-1, (2,), (1,)), "offset -1"),
        (tensor(0, (-2,), (1,)), r"shape \(-2,\)"),
        (tensor(0, (2, 2), (1,)), "strides"),
        (tensor(0, (2.5,), (1,)), "whole numbers"),
        (tensor(0, (12,), (1,), count=13), "storage '0' has 48 bytes, not 13 float32 elements"),
        (tensor(0, (1,), (1,), key="7", count=1), "entry 'archive/data/7' is missing"),
        (tensor(0, (1,), (1,), key="../data.pkl", count=1), "is missing"),
        ({3: tensor(0, (1,), (1,))["w"]}, "not named by strings"),
        ({"epoch": 3}, "no tensors under state_dict.*its keys: epoch"),
        ([1, 2], "holds no state_dict"),
    ],
)
def test_a_tensor_that_cannot_be_is_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(TorchFileError, match=rf"w\.pt: .*{message}"):
        read_tensors(archive(tmp_path / "w.pt", pickled(content)))


def test_a_pickled_module_is_no_state_dict(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pt")
    with pytest.raises(TorchFileError, match=r"save model.state_dict\(\)"):
        read_tensors(tmp_path / "w.pt")


def test_a_pickle_that_wants_gigabytes_of_memory_slots(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pt", b"\x80\x02]r" + struct.pack("<I", 2**31 - 1) + b".")
    with pytest.raises(TorchFileError, match="2147483647 memory slots"):
        read_tensors(path)


def test_a_pickle_that_stops_in_the_middle(tmp_path: Path) -> None:
    with pytest.raises(TorchFileError, match="its pickle is broken"):
        read_tensors(archive(tmp_path / "w.pt", pickled(tensor(0, (1,), (1,)))[:-20]))


def test_torchscript_modules_that_contain_each_other(tmp_path: Path) -> None:
    content = b"\x80\x02c__torch__\nLoop\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    with pytest.raises(TorchFileError, match="contain each other"):
        read_tensors(archive(tmp_path / "w.pt", content))


def test_a_compressed_archive_is_not_unpacked(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pt", pickled({"a": "b" * 10**6}), zipfile.ZIP_DEFLATED)
    with pytest.raises(TorchFileError, match=r"data\.pkl' is compressed or encrypted, which torch never does"):
        read_tensors(path)


def test_entries_that_claim_more_than_the_file(tmp_path: Path) -> None:
    path = archive(tmp_path / "w.pt", pickled(tensor(0, (1,), (1,))))
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"PK\x01\x02")  # the entry of the storage in the directory at the end
    data[directory + 20 : directory + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(data)
    with pytest.raises(TorchFileError, match="entries claim 2147483.* bytes, more than the file's"):
        read_tensors(path)


def test_an_archive_without_a_pickle(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as file:
        file.writestr("photo.jpg", b"")
    with pytest.raises(TorchFileError, match=r"no torch checkpoint: it has no data\.pkl"):
        read_tensors(tmp_path / "w.pt")


def test_a_big_endian_file(tmp_path: Path) -> None:
    with pytest.raises(TorchFileError, match="big-endian"):
        read_tensors(archive(tmp_path / "w.pt", pickled(tensor(0, (1,), (1,))), byteorder=b"big"))


def test_a_truncated_file(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "w.pt")
    data = (tmp_path / "w.pt").read_bytes()
    (tmp_path / "w.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(TorchFileError, match="truncated or broken"):
        read_tensors(tmp_path / "w.pt")


@pytest.mark.parametrize("content", [b"layer.weight", np.float32(0.5).tobytes()], ids=["name", "number"])
def test_a_bit_that_flipped_on_the_way(tmp_path: Path, content: bytes) -> None:
    """Torch writes a checksum of every entry, unless it is told to write zeros."""
    weights = {"layer.weight": torch.tensor([0.5, 2.0]), "more": {"optimizer": torch.zeros(5)}}
    torch.save(weights, tmp_path / "w.pt")
    data = bytearray((tmp_path / "w.pt").read_bytes())
    data[data.index(content)] ^= 1
    (tmp_path / "w.pt").write_bytes(data)
    with pytest.raises(
        TorchFileError, match=r"w\.pt: its entry 'w/data\S+' is damaged \(wrong checksum\): download it"
    ):
        read_tensors(tmp_path / "w.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(weights, tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_tensors(tmp_path / "unchecked.pt")["layer.weight"].tolist() == [0.5, 2.0]


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt: no such file"):
        read_tensors(tmp_path / "nowhere.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(TorchFileError, match=r"pipe\.pt: not a regular file"):
        read_tensors(tmp_path / "pipe.pt")


def test_folders_that_lack_something(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors"):
        read_tensors(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(TorchFileError, match=r"index\.json: not an index of shards"):
        read_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(TorchFileError, match=r"shard '\.\./secret.safetensors' is outside the folder"):
        read_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"one\.safetensors"):
        read_tensors(tmp_path)
    write_safetensors(tmp_path / "one.safetensors", {"b": np.zeros(1)}, {})
    with pytest.raises(TorchFileError, match=r"one\.safetensors: lacks a, which model.safetensors.index.json"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_damaged_bytes_give_tensors_or_a_clear_error_and_nothing_else(tmp_path: Path, name: str) -> None:
    path, dice = tmp_path / name, random.Random(0)
    if name == "w.pt":
        torch.save({"state_dict": state_dict(), "epoch": 1}, path)
    else:
        write_safetensors(path, {key: value.numpy() for key, value in state_dict().items()}, {})
    original = path.read_bytes()
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(300):
        damaged = bytearray(original)
        for _ in range(dice.randint(1, 4)):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        path.write_bytes(damaged[: dice.randint(1, len(damaged))] if dice.random() < 0.3 else damaged)
        try:
            outcomes["read"] += all(value.nbytes < 10**6 for value in read_tensors(path).values())
        except TorchFileError:
            outcomes["refused"] += 1
    assert outcomes["read"] and outcomes["refused"] and sum(outcomes.values()) == 300
